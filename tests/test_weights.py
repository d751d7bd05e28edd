"""Loading weights: wrapped in dicts, with prefixed names, from safetensors files, or of another model."""

import numpy as np
import pytest
import torch as th
from helpers import SMALL, fill_by_name, refused

from guided_diffusion import logger
from guided_diffusion.checkpoint_util import load_weights
from guided_diffusion.unet import UNetModel

pytestmark = pytest.mark.usefixtures("cpu")


@pytest.fixture(scope="module")
def weights():
    return fill_by_name(UNetModel(**SMALL)).state_dict()


def load(path):
    """Load a weight file into a new network. Return the network's weights and the log messages."""
    with logger.scoped_configure(str(path.parent), format_strs=["log"]):
        model = UNetModel(**SMALL)
        load_weights(model, str(path))
    return model.state_dict(), (path.parent / "log.txt").read_text()


def prefixed(prefix, state_dict):
    return {prefix + name: v for name, v in state_dict.items()}


FORMS = {
    "bare": (lambda w: w, []),
    "DistributedDataParallel": (lambda w: prefixed("module.", w), ["'module.'"]),
    "compiled": (lambda w: prefixed("_orig_mod.", w), ["'_orig_mod.'"]),
    "both": (lambda w: prefixed("module._orig_mod.", w), ["'module.'", "'_orig_mod.'"]),
    "state_dict": (lambda w: {"state_dict": w, "epoch": 3}, ["'state_dict'", "epoch"]),
    "model": (lambda w: {"model": w, "optimizer": {"lr": 0.1}}, ["'model'", "optimizer"]),
    "model_state_dict": (lambda w: {"model_state_dict": prefixed("module.", w)}, ["'model_state_dict'", "'module.'"]),
    "ema": (lambda w: {"model": {n: v + 1 for n, v in w.items()}, "ema": w}, ["'ema'"]),
    "twice": (lambda w: {"model": {"state_dict": w}}, ["'model'", "'state_dict'"]),
}


@pytest.mark.parametrize("form", FORMS)
def test_wrappers_and_prefixes_are_removed_and_logged(form, weights, tmp_path):
    wrap, words = FORMS[form]
    th.save(wrap(weights), tmp_path / "model.pt")
    loaded, log = load(tmp_path / "model.pt")
    assert all(th.equal(v, weights[name]) for name, v in loaded.items())
    assert all(word in log for word in words) and (bool(words) == ("model.pt" in log))


def test_safetensors(weights, tmp_path):
    name, safetensors = "model.safetensors", pytest.importorskip("safetensors.torch")
    safetensors.save_file(prefixed("module.", weights), tmp_path / name)
    loaded, log = load(tmp_path / name)
    assert all(th.equal(v, weights[name]) for name, v in loaded.items())
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-100])
    refused(lambda: load(tmp_path / name), name, "damaged safetensors")


def test_refusals_say_what_the_file_is(weights, tmp_path):
    path = tmp_path / "model.pt"
    opt = th.optim.AdamW([th.nn.Parameter(th.zeros(2))])
    for content, words in (
        (opt.state_dict(), ["an optimizer's state"]),
        ({"generator": weights, "step": 3}, ["generator, step"]),
        ({"model": 3}, ["int"]),
        ([1, 2], ["list"]),
        ({}, ["dict"]),
    ):
        th.save(content, path)
        refused(lambda: load(path), "model.pt", *words)
    for content in (b"", b"a page that says 404, perhaps\n" * 20):
        path.write_bytes(content)
        refused(lambda: load(path), "model.pt", "damaged")
    np.savez(tmp_path / "samples.npz", np.zeros(3))
    refused(lambda: load(tmp_path / "samples.npz"), "samples.npz")
    refused(lambda: load(tmp_path / "nothing.pt"), "nothing.pt", "No such file")


def test_weights_of_another_model_are_refused_with_both_shapes(weights, tmp_path):
    path = tmp_path / "model.pt"
    other = UNetModel(**{**SMALL, "model_channels": 64})
    th.save(other.state_dict(), path)
    differing = [(n, tuple(v.shape), tuple(weights[n].shape)) for n, v in other.state_dict().items()]
    differing = [(n, a, b) for n, a, b in differing if a != b]
    words = [f"{n} is {a} in the file and {b} here" for n, a, b in differing[:3]]
    refused(
        lambda: load(path), "model.pt: the weights do not fit the model", *words, f"{len(differing) - 3} more differ"
    )
    (tmp_path / "config.json").write_text('{"flags": {"num_channels": 64}}')
    refused(lambda: load(path), f"recorded in {tmp_path / 'config.json'}")
    fewer = {n: v for n, v in weights.items() if n != "out.2.bias"}
    th.save({**fewer, "out.3.bias": th.zeros(5)}, path)
    refused(
        lambda: load(path),
        "out.2.bias is missing in the file and (3,) here",
        "out.3.bias is (5,) in the file and missing here",
    )
