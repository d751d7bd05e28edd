"""Training that goes wrong: losses, gradients and weights that are not finite, and full disks."""

import math
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch as th
from helpers import batch_of, copies, new_loop, new_model, quick_half_convolutions, refused
from launch import TINY, clean_environment, flags, run, script

from guided_diffusion import logger
from guided_diffusion.errors import RunStopped
from guided_diffusion.fp16_util import MixedPrecisionTrainer
from guided_diffusion.resample import LossSecondMomentResampler

pytestmark = pytest.mark.usefixtures("quiet", "cpu")
PRECISIONS = [{}, {"use_bf16": True}, {"use_fp16": True, "initial_lg_loss_scale": 4.0}]


def bad_batch():
    x = batch_of(6)
    x[3, 0, 0, 0] = math.nan
    return x


def endless(batches):
    while True:
        for batch in batches:
            yield batch, {}


# Skipped steps


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_a_bad_step_is_skipped_and_the_next_goes_on(precision, monkeypatch):
    with quick_half_convolutions(monkeypatch):
        loop = new_loop(*new_model(), **precision)
        loop.run_step(batch_of(6), {})
        watched = [*loop.mp_trainer.master_params, *loop.ema_params[0], *loop.model.parameters()]
        watched += [v for state in loop.opt.state.values() for v in state.values()]
        before = copies(watched)
        loop.run_step(bad_batch(), {})
        assert all(th.equal(a, b) for a, b in zip(before, watched))
        assert loop.bad_steps == 1
        loop.run_step(batch_of(6), {})
        assert loop.bad_steps == 0
        assert any(not th.equal(a, b) for a, b in zip(before, watched)) and all(v.isfinite().all() for v in watched)


def test_a_step_with_a_bad_loss_and_a_good_gradient_is_skipped():
    model = th.nn.Linear(1, 1)
    trainer = MixedPrecisionTrainer(model=model)
    opt = th.optim.SGD(trainer.master_params, lr=0.1)
    for constant, taken in [(math.inf, False), (math.nan, False), (1e30, True)]:
        trainer.zero_grad()
        trainer.backward(model(th.ones(1, 1)).sum() + constant)
        assert trainer.optimize(opt) is taken


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_a_run_whose_steps_stay_bad_stops_with_the_reason(precision, quiet, monkeypatch):
    batches = [batch_of(6)] * 2 + [bad_batch()] * 8
    with quick_half_convolutions(monkeypatch):
        loop = new_loop(*new_model(), data=endless(batches), save_interval=2, max_bad_steps=5, **precision)
        with pytest.raises(RunStopped) as caught:
            loop.run_loop()
    message = str(caught.value)
    assert "\n" not in message
    # Steps 2 to 6 were bad, counted from 0.
    for words in ("step 6:", "5 consecutive steps", "--max_bad_steps", "loss nan", "mse nan"):
        assert words in message, message
    # After skipped steps nothing is saved.
    assert os.path.join(quiet, "model000002.pt") in message
    assert [name for name in os.listdir(quiet) if name.startswith("model")] == ["model000002.pt"]
    names = [name for name, _ in loop.model.named_parameters()]
    assert f"{len(names)} of {len(names)}, the first {names[0]}" in message


def test_good_steps_between_bad_ones_keep_a_run_going():
    batches = [bad_batch(), bad_batch(), batch_of(6)]
    loop = new_loop(*new_model(), data=endless(batches), total_steps=9, max_bad_steps=3)
    loop.run_loop()
    assert loop.steps_done == 9


def test_max_bad_steps_of_0_never_stops_a_run():
    loop = new_loop(*new_model(), data=endless([bad_batch()]), total_steps=25, max_bad_steps=0)
    loop.run_loop()
    assert loop.steps_done == 25 and loop.bad_steps == 25


def test_a_checkpoint_after_skipped_steps_does_not_replace_a_good_one(quiet):
    """A run that ends after skipped steps saves once more."""
    batches = [batch_of(6)] * 4 + [bad_batch()] * 6
    loop = new_loop(*new_model(), data=endless(batches), save_interval=2, total_steps=9, keep_checkpoints=1)
    loop.run_loop()
    saved = sorted(name for name in os.listdir(quiet) if name.startswith("model"))
    assert saved == ["model000004.pt", "model000009.pt"]
    assert loop.checkpoints.last_good.endswith("model000004.pt")


@pytest.mark.parametrize("end, step", [("total_steps", 4), ("a signal", 4), ("save_interval", 3)])
@pytest.mark.parametrize("precision", PRECISIONS[:2], ids=str)
def test_weights_that_are_not_finite_are_never_saved(precision, end, step, quiet):
    """The step that spoils them has a finite loss and gradient: only the next one would be skipped."""
    loop = new_loop(*new_model(), data=endless([batch_of(6)]), save_interval=2, total_steps=2, **precision)
    loop.run_loop()
    saved, good = sorted(os.listdir(quiet)), os.path.join(quiet, "model000002.pt")
    loop = new_loop(
        *new_model(), data=endless([batch_of(6)]), resume_checkpoint=good, lr=1e38, weight_decay=10.0,
        save_interval=3 if end == "save_interval" else 100, total_steps=4 if end == "total_steps" else 100, **precision,
    )  # fmt: skip
    if end == "a signal":
        loop.after_step = lambda: os.kill(os.getpid(), signal.SIGTERM) if loop.step else None
    with pytest.raises(RunStopped) as caught:
        loop.run_loop()
    message = str(caught.value)
    assert "\n" not in message and f"step {step}: weights are not finite" in message, message
    assert f"Last good checkpoint: {good}" in message and sorted(os.listdir(quiet)) == saved


def test_averages_that_are_not_finite_are_never_saved(quiet):
    loop = new_loop(*new_model(), data=endless([batch_of(6)]), total_steps=3)
    with th.no_grad():
        loop.ema_params[0][0].view(-1)[0] = -math.inf
    refused(loop.run_loop, "step 3: weights are not finite", "ema_0.9_000003.pt", "1 of ", "none yet")
    assert os.listdir(quiet) == []


@pytest.mark.parametrize("name", ["model000002.pt", "ema_0.9_000002.pt"])
def test_weights_that_are_not_finite_are_not_resumed_from(name, quiet):
    new_loop(*new_model(), data=endless([batch_of(6)]), total_steps=2).run_loop()
    path = os.path.join(quiet, name)
    weights = th.load(path)
    weights["out.2.bias"][0] = math.nan
    th.save(weights, path)
    refused(lambda: new_loop(*new_model(), resume_checkpoint="auto"), f"{path}: refused: 1 of", "the first out.2.bias")


def test_importance_sampling_learns_nothing_from_a_bad_loss():
    """Also not from a history that was saved before losses were looked at."""
    model, diffusion = new_model(diffusion_steps=4, noise_schedule="cosine")
    sampler = LossSecondMomentResampler(diffusion, history_per_term=2)
    batches = [batch_of(6)] * 6 + [bad_batch()] + [batch_of(6)] * 3
    loop = new_loop(model, diffusion, data=endless(batches), schedule_sampler=sampler, total_steps=10)
    loop.run_loop()
    assert sampler._loss_counts.min() == 2 and np.isfinite(sampler.weights()).all()
    spoilt = sampler.state_dict()
    spoilt["history"][1, 0] = math.nan
    sampler.load_state_dict(spoilt)
    assert sampler._loss_counts.tolist() == [2, 0, 2, 2] and np.isfinite(sampler.weights()).all()


# Long gradients


def test_long_gradients_are_shrunk_and_short_ones_are_not():
    model = th.nn.Linear(2, 1, bias=False)
    trainer = MixedPrecisionTrainer(model=model, max_grad_norm=1.0)
    opt = th.optim.SGD(trainer.master_params, lr=1.0)
    for slope, step in [((3.0, 4.0), (0.6, 0.8)), ((0.3, 0.4), (0.3, 0.4))]:
        before = model.weight.detach().clone()
        trainer.zero_grad()
        trainer.backward((model.weight * th.tensor(slope)).sum())
        trainer.optimize(opt)
        assert th.allclose(before - model.weight, th.tensor([step]), atol=1e-6)
    assert logger.getkvs()["grad_norm"] == pytest.approx((5 + 0.5) / 2)  # as it was


# On several ranks

PLANTED = """
import sys
import torch as th
import helpers
from guided_diffusion import dist_util, logger
dist_util.setup_dist()
rank = dist_util.get_rank()
logger.configure(sys.argv[1], format_strs=[])
planted = [int(step) for step in sys.argv[3].split(",")]

def batches():
    for step in range(100):
        x = helpers.batch_of(4, seed=10 * step + rank)
        if rank == 1 and step in planted:
            x[0, 0, 0, 0] = float("nan")
        yield x, {}

model, diffusion = helpers.new_model()
loop = helpers.new_loop(
    model, diffusion, batch_size=4, data=batches(), total_steps=10, max_bad_steps=3,
    **{"fp32": {}, "bf16": {"use_bf16": True}, "fp16": {"use_fp16": True, "initial_lg_loss_scale": 4.0}}[sys.argv[2]],
)
skipped = []
optimize = loop.mp_trainer.optimize
def noting(opt):
    took = optimize(opt)
    if not took:
        skipped.append(loop.steps_done)
    return took
loop.mp_trainer.optimize = noting
loop.run_loop()
digest = float(sum(p.detach().double().abs().sum() for p in loop.mp_trainer.master_params))
print(f"\\nrank {rank} skipped {skipped} and ended with {digest!r}", flush=True)
"""


def train_planted(folder, precision, planted, code=PLANTED):
    env = {"PYTHONPATH": os.path.dirname(__file__) + os.pathsep + clean_environment()["PYTHONPATH"]}
    return run(["-c", code, str(folder), precision, planted], ranks=2, env=env)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_bad_batch_on_one_rank_skips_the_step_on_all(precision, tmp_path):
    done = train_planted(tmp_path, precision, "2,5,6").check()
    ends = sorted(line for line in done.output.splitlines() if line.startswith("rank"))
    assert len(ends) == 2 and all("skipped [2, 5, 6]" in end for end in ends), done.output
    assert ends[0].split("ended with")[1] == ends[1].split("ended with")[1]


NOT_FINITE = PLANTED.replace("max_bad_steps=3,", "max_bad_steps=0, lr=1e38, weight_decay=10.0,")
ENDS = {"bad batches": (PLANTED, "4,5,6", ["step 6:", "loss nan on rank 1"]),
        "bad weights": (NOT_FINITE, "-1", ["step 10: weights are not finite"])}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_divergence_ends_all_ranks_with_one_message(name, tmp_path):
    code, planted, words = ENDS[name]
    done = train_planted(tmp_path, "fp32", planted, code)
    assert done.returncode != 0 and "Traceback" not in done.output
    lines = [line for line in done.output.splitlines() if "error:" in line]
    assert len(lines) == 1 and all(word in lines[0] for word in words), done.output
    assert not list(tmp_path.glob("*.pt"))


# Full disks


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    """A limit on the size of files stands in for the disk: it refuses writes in the midst of a file."""
    from PIL import Image

    images = tmp_path / "images"
    images.mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(images / f"{i}.png")
    folder = tmp_path / "run"
    options = dict(TINY, data_dir=images, log_dir=folder, batch_size=2, num_workers=0, save_interval=2, log_interval=1)
    run([script("image_train"), *flags(**options, total_steps=2)]).check()
    before = {p.name: p.read_bytes() for p in folder.glob("*.pt")}

    # The optimiser's file holds two numbers for each of the model's one: it fits no more, the model's would.
    limit = os.path.getsize(folder / "model000002.pt") * 3 // 2
    done = subprocess.run(
        [sys.executable, script("image_train"), *flags(**options, total_steps=6, resume_checkpoint="auto")],
        env=clean_environment(), capture_output=True, text=True, timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    error = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and "opt000004.pt: cannot be written (File too large)" in error[0], done.stderr
    assert str(folder / "model000002.pt") in error[0]
    assert {p.name: p.read_bytes() for p in folder.glob("*.pt")} == before
    assert not list(folder.glob("*.tmp"))

    # With room again, the same command goes on.
    run([script("image_train"), *flags(**options, total_steps=6, resume_checkpoint="auto")]).check()
    assert (folder / "model000006.pt").exists()
