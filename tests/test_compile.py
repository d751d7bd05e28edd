"""--compile True: compiled networks give the same results as uncompiled networks."""

import functools
import shutil

import numpy as np
import pytest
import torch as th
from helpers import randn, relative_error
from launch import flags, run, script
from sampling import MODEL, check_alike, new_network, read_npz, run_here

from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults
from guided_diffusion.train_util import TrainLoop

pytestmark = pytest.mark.usefixtures("cpu")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


@pytest.fixture
def without_codegen(monkeypatch):
    """Replace the inductor backend of torch.compile by aot_eager, which skips the slow generation of kernels."""
    monkeypatch.setattr(th, "compile", functools.partial(th.compile, backend="aot_eager"))


@needs_compiler
def test_compiled_kernels_give_the_same_output():
    network = new_network(MODEL).requires_grad_(False)
    x, t, y = randn(0, 3, 3, 8, 8), th.arange(3) * 100, th.arange(3)
    assert relative_error(th.compile(network, dynamic=False)(x, t, y=y), network(x, t, y=y)) < 1e-5


def test_a_compiled_job_makes_the_same_images(without_codegen, networks, tmp_path, monkeypatch):
    made = []
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        run_here(monkeypatch, "classifier_sample", **networks, log_dir=folder, num_samples=4, batch_size=4,
                 timestep_respacing=2, compile=compiled)  # fmt: skip
        made.append(read_npz(folder))
    check_alike(made[0]["arr_0"], made[1]["arr_0"])
    assert np.array_equal(made[0]["arr_1"], made[1]["arr_1"])


def test_compiled_training_takes_the_same_steps(without_codegen, quiet):
    th._dynamo.reset()
    weights = []
    for compiled in (False, True):
        th.manual_seed(0)
        model, diffusion = create_model_and_diffusion(**{**model_and_diffusion_defaults(), **MODEL})
        loop = TrainLoop(model=model, diffusion=diffusion, data=None, batch_size=4, microbatch=3, lr=1e-3,
                         ema_rate="0.9", log_interval=10, save_interval=10, resume_checkpoint="", seed=0,
                         compile=compiled)  # fmt: skip
        for step in range(3):
            loop.run_step(randn(step, 4, 3, 8, 8), {"y": th.arange(4)})
            loop.step += 1
        weights.append({name: p.detach() for name, p in loop.model.named_parameters()})
    assert weights[0].keys() == weights[1].keys()
    for name, p in weights[0].items():
        assert (p - weights[1][name]).abs().max() < 1e-4, name


def test_without_a_compiler_the_script_stops_with_a_one_line_message(networks, tmp_path):
    model_flags = {k: v for k, v in networks.items() if k in MODEL or k == "model_path"}
    argv = [script("image_sample"), *flags(**model_flags, log_dir=tmp_path, num_samples=2, batch_size=2, compile=True)]
    outcome = run(argv, env=dict(CXX="no-such-compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache")))
    assert outcome.returncode != 0 and "Traceback" not in outcome.output
    last = outcome.output.strip().splitlines()[-1]
    assert "--compile True" in last and "C++ compiler" in last
