"""Upsampling an .npz file of small images, and the pipeline that samples and then upsamples."""

import numpy as np
import pytest
import torch as th
from helpers import refused
from launch import flags, run_ranks, script
from sampling import UPSAMPLER, new_network, pictures, prefixed, read_npz, run_here, save_network

from guided_diffusion.random_util import SampleNoise
from guided_diffusion.sample_job import UPSAMPLING, BaseSamples
from guided_diffusion.script_util import sr_create_model_and_diffusion, sr_model_and_diffusion_defaults

pytestmark = pytest.mark.usefixtures("quiet", "cpu")
SMALL = (8, 8, 3)


@pytest.fixture(scope="module")
def upsampler(tmp_path_factory):
    path = save_network(str(tmp_path_factory.mktemp("upsampler") / "model.pt"), UPSAMPLER)
    return dict(UPSAMPLER, model_path=path, timestep_respacing=3)


def write_base(path, count=3, labels=(2, 0, 3), **arrays):
    arrays = {
        "arr_0": pictures(range(count), SMALL),
        **({} if labels is None else {"arr_1": np.array(labels)}),
        **arrays,
    }
    np.savez(path, **arrays)
    return str(path)


def upsample(monkeypatch, folder, base, **options):
    run_here(monkeypatch, "super_res_sample", base_samples=base, log_dir=folder, **{"batch_size": 4, **options})
    return read_npz(folder)


def by_hand(flags, base, labels, seed, indices, use_ddim):
    """Upsample base images one at a time with the library's sampling loops. Returns a float tensor [n, 3, 16, 16]."""
    options = {k: v for k, v in flags.items() if k in sr_model_and_diffusion_defaults()}
    diffusion = sr_create_model_and_diffusion(
        **{**sr_model_and_diffusion_defaults(), **options, "timestep_respacing": str(flags["timestep_respacing"])}
    )[1]
    model, samples = new_network(UPSAMPLER), []
    for i in indices:
        noise = SampleNoise(seed, [i], "cpu", UPSAMPLING)
        low_res = th.from_numpy(base[i % len(base)].astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
        samples.append((diffusion.ddim_sample_loop if use_ddim else diffusion.p_sample_loop)(
            model, (1, 3, 16, 16), noise=noise.randn(3, 16, 16), randn_like=noise.randn_like,
            model_kwargs=dict(low_res=low_res, y=th.tensor([labels[i % len(base)]])),
        ))  # fmt: skip
    return th.cat(samples)


@pytest.mark.parametrize("use_ddim", [False, True])
def test_sample_i_is_made_from_base_image_i_mod_n(use_ddim, upsampler, monkeypatch, tmp_path):
    """Seven samples of three base images, in batches of four, keep the labels and use DDIM if --use_ddim is set."""
    found = upsample(monkeypatch, tmp_path / "out", write_base(tmp_path / "base.npz"), **upsampler, num_samples=7,
                     seed=5, use_ddim=use_ddim)  # fmt: skip
    assert found["arr_1"].tolist() == [2, 0, 3, 2, 0, 3, 2] and found["arr_0"].shape == (7, 16, 16, 3)
    want = by_hand(upsampler, pictures(range(3), SMALL), [2, 0, 3], 5, range(7), use_ddim)
    want = ((want + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(found["arr_0"] - np.floor(want)).max() <= 1 and found["arr_0"].std() > 5
    # Samples 0, 3 and 6 have the same base image and label, but different noise.
    assert len({found["arr_0"][i].tobytes() for i in (0, 3, 6)}) == 3


def test_an_unconditional_upsampler_keeps_the_labels_of_the_base_images(monkeypatch, tmp_path):
    network = {**UPSAMPLER, "class_cond": False}
    path = save_network(str(tmp_path / "model.pt"), network)
    options = dict(network, model_path=path, timestep_respacing=2, num_samples=4)
    labelled = upsample(monkeypatch, tmp_path / "a", write_base(tmp_path / "a.npz"), **options)
    assert labelled["arr_1"].tolist() == [2, 0, 3, 2]
    bare = upsample(monkeypatch, tmp_path / "b", write_base(tmp_path / "b.npz", labels=None), **options)
    assert bare.keys() == {"arr_0"} and (bare["arr_0"] == labelled["arr_0"]).all()


def test_a_changed_base_samples_file_is_refused(upsampler, monkeypatch, tmp_path):
    options = dict(upsampler, num_samples=3)
    upsample(monkeypatch, tmp_path / "out", write_base(tmp_path / "base.npz"), **options)
    other = write_base(tmp_path / "base.npz", arr_0=pictures(range(1, 4), SMALL))
    refused(lambda: upsample(monkeypatch, tmp_path / "out", other, **options), "--base_samples", "--log_dir")


BAD_BASES = {
    "another size": (dict(arr_0=np.zeros((3, 4, 4, 3), np.uint8)), ["3x4x4x3", "Nx8x8x3", "--small_size"]),
    "grey": (dict(arr_0=np.zeros((3, 8, 8, 1), np.uint8)), ["3x8x8x1", "Nx8x8x3"]),
    "floats": (dict(arr_0=np.zeros((3, 8, 8, 3), np.float32)), ["float32", "uint8"]),
    "one image": (dict(arr_0=np.zeros((8, 8, 3), np.uint8)), ["[N, H, W, C]"]),
    "no images": (dict(arr_0=np.zeros((0, 8, 8, 3), np.uint8), arr_1=np.zeros(0, int)), ["0x8x8x3"]),
    "no labels": (dict(labels=None), ["no labels", "arr_1", "class-conditional"]),
    "too few labels": (dict(labels=[1, 2]), ["arr_1", "(2,)"]),
    "one-hot labels": (dict(labels=np.eye(3, 4, dtype=int)), ["arr_1", "(3, 4)"]),
    "labels that are objects": (dict(labels=np.array([{}] * 3, dtype=object)), ["arr_1", "cannot be read"]),
    "labels out of range": (dict(labels=[0, 4, 1]), ["labels outside", "0..3"]),
    "negative labels": (dict(labels=[0, -1, 1]), ["labels outside", "0..3"]),
}


@pytest.mark.parametrize("name", BAD_BASES)
def test_base_samples_of_the_wrong_shape_or_type_are_refused(name, tmp_path):
    arrays, words = BAD_BASES[name]
    path = write_base(tmp_path / "base.npz", **arrays)
    refused(lambda: BaseSamples(path, (8, 8), 3, 4, True), f"--base_samples {path}", *words)


def test_unreadable_base_samples_are_refused(upsampler, monkeypatch, tmp_path):
    path = tmp_path / "base.npz"
    whole = open(write_base(path), "rb").read()
    for content in (whole[:300], whole[:-1], b"404\n" * 100, b""):
        path.write_bytes(content)
        refused(lambda: BaseSamples(str(path), (8, 8), 3, 4, True), f"--base_samples {path}", "[N, H, W, C]")
    refused(lambda: upsample(monkeypatch, tmp_path / "out", path, **upsampler), f"--base_samples {path}")
    path.unlink()
    refused(lambda: BaseSamples(str(path), (8, 8), 3, 4, True), f"--base_samples {path}", "no such file")
    refused(lambda: BaseSamples("", (8, 8), 3, 4, True), "--base_samples is missing")


# The pipeline


@pytest.fixture(scope="module")
def pipeline(networks, upsampler):
    options = dict(networks, num_samples=8, batch_size=3, timestep_respacing=3, use_ddim=True, seed=3)
    upsampling = {**UPSAMPLER, "path": upsampler["model_path"], "batch_size": 2, "timestep_respacing": 2}
    return {**options, **prefixed("upsampler_", upsampling)}


def test_the_pipeline_gives_the_same_samples_as_its_two_scripts(pipeline, monkeypatch, tmp_path):
    first = {k: v for k, v in pipeline.items() if not k.startswith("upsampler_")}
    second = {k.removeprefix("upsampler_"): v for k, v in pipeline.items() if k not in first}
    second.update(
        model_path=second.pop("path"), base_samples=tmp_path / "small/samples_8x8x8x3.npz", num_samples=8, seed=3
    )
    run_here(monkeypatch, "classifier_sample", **first, log_dir=tmp_path / "small")
    run_here(monkeypatch, "super_res_sample", **second, log_dir=tmp_path / "large")
    run_here(monkeypatch, "pipeline_sample", **pipeline, log_dir=tmp_path / "both")
    small, large = (read_npz(tmp_path / name) for name in ("small", "large"))
    for folder, want in ((tmp_path / "both/base", small), (tmp_path / "both", large)):
        found = read_npz(folder)
        assert all((found[name] == want[name]).all() for name in ("arr_0", "arr_1"))
    assert large["arr_0"].shape == (8, 16, 16, 3) and (large["arr_1"] == small["arr_1"]).all()
    assert large["arr_0"].std() > 5
    for name, value in dict(classifier_scale=2.0, upsampler_timestep_respacing=3, upsampler_use_ddim=True).items():
        run = {**pipeline, name: value, "log_dir": tmp_path / "both"}
        refused(lambda r=run: run_here(monkeypatch, "pipeline_sample", **r), f"--{name} ")


def test_a_killed_pipeline_resumes(pipeline, tmp_path):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    argv = [script("pipeline_sample"), *flags(**pipeline)]
    run_ranks(2, [*argv, "--log_dir", alone])[0].check()
    moments = [("base/shards/*-*.npz", 1), ("base/samples*.npz", 1), ("shards/*-*.npz", 2)]
    seen = {}
    for pattern, count in moments:
        assert run_ranks(2, [*argv, "--log_dir", killed], kill_at=(killed / pattern, count, 0))[1], pattern
        there = [*killed.glob("**/samples*.npz"), *killed.glob("**/shards/*-*.npz")]
        now = {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in there}
        kept = {path: stat for path, stat in seen.items() if "base/shards" not in path or path in now}
        assert kept.items() <= now.items()  # no finished file was rewritten
        seen = now
    run_ranks(2, [*argv, "--log_dir", killed])[0].check()
    for name in ("base/samples_8x8x8x3.npz", "samples_8x16x16x3.npz"):
        assert (alone / name).read_bytes() == (killed / name).read_bytes()
    assert not [*killed.glob("**/*.tmp"), *killed.glob("**/shards")]


def test_an_incompatible_upsampler_is_refused_before_sampling(pipeline, monkeypatch, tmp_path):
    def refuse(*words, **changes):
        run = {**pipeline, **changes}
        refused(lambda: run_here(monkeypatch, "pipeline_sample", **run, log_dir=tmp_path / "out"), *words)
        assert not (tmp_path / "out/base").exists()

    refuse("--upsampler_small_size 4", "--image_size 8", upsampler_small_size=4)
    refuse("--upsampler_num_classes 3", "--num_classes 4", upsampler_num_classes=3)
    refuse("--upsampler_in_channels 1", "--in_channels 3", upsampler_in_channels=1)
    refuse("--upsampler_batch_size 0", upsampler_batch_size=0)
    refuse(pipeline["upsampler_path"], "input_blocks.2.0", "missing in the file", upsampler_num_res_blocks=2)
    refuse("--upsampler_path", "gone.pt", upsampler_path=tmp_path / "gone.pt")
    refuse("--timestep_respacing", "2000", upsampler_timestep_respacing=2000)
