"""Failures during training: non-finite losses, gradients and weights, and full disks."""

import json
import math
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch as th
from helpers import batch_of, copies, endless, new_loop, new_model, quick_half_convolutions, refused
from launch import check_refused, run_ranks

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


# Skipped steps


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_a_non_finite_step_is_skipped_and_training_continues(precision, monkeypatch):
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


def test_a_step_with_a_non_finite_loss_and_a_finite_gradient_is_skipped():
    model = th.nn.Linear(1, 1)
    trainer = MixedPrecisionTrainer(model=model)
    opt = th.optim.SGD(trainer.master_params, lr=0.1)
    for constant, taken in [(math.inf, False), (math.nan, False), (1e30, True)]:
        trainer.zero_grad()
        trainer.backward(model(th.ones(1, 1)).sum() + constant)
        assert trainer.optimize(opt) is taken


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_a_run_stops_with_a_message_after_max_bad_steps(precision, quiet, monkeypatch):
    batches = [batch_of(6)] * 2 + [bad_batch()] * 8
    with quick_half_convolutions(monkeypatch):
        loop = new_loop(*new_model(), data=endless(*batches), save_interval=2, max_bad_steps=5, **precision)
        with pytest.raises(RunStopped) as caught:
            loop.run_loop()
    message = str(caught.value)
    assert "\n" not in message
    # Batches 2 to 6, counted from 0, are bad. The run stops after the fifth of these.
    for words in ("step 6:", "5 consecutive steps", "--max_bad_steps"):
        assert words in message, message
    # No checkpoint is saved after a skipped step.
    assert os.path.join(quiet, "model000002.pt") in message
    assert [name for name in os.listdir(quiet) if name.startswith("model")] == ["model000002.pt"]


@pytest.mark.parametrize("batches, max_bad_steps", [("bbg", 3), ("b", 0)])
def test_fewer_consecutive_bad_steps_than_max_bad_steps_do_not_stop_a_run(batches, max_bad_steps):
    batches = [bad_batch() if kind == "b" else batch_of(6) for kind in batches]
    loop = new_loop(*new_model(), data=endless(*batches), total_steps=24, max_bad_steps=max_bad_steps)
    loop.run_loop()
    assert loop.steps_done == 24


def test_a_checkpoint_is_delayed_until_a_step_is_not_skipped(quiet):
    batches = [batch_of(6)] * 3 + [bad_batch()] * 2 + [batch_of(6)]
    new_loop(*new_model(), data=endless(*batches), save_interval=2, total_steps=7).run_loop()
    saved = sorted(name for name in os.listdir(quiet) if name.startswith("model"))
    assert saved == ["model000002.pt", "model000006.pt", "model000007.pt"]


ENDS = {"total_steps": (4, dict(total_steps=4)), "a signal": (4, {}), "save_interval": (3, dict(save_interval=3))}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("precision", PRECISIONS[:2], ids=str)
def test_non_finite_weights_are_never_saved(precision, end, quiet):
    """The optimizer step that makes the weights non-finite has a finite loss and gradient, so it is not skipped."""
    new_loop(*new_model(), data=endless(), total_steps=2, **precision).run_loop()
    saved, good = sorted(os.listdir(quiet)), os.path.join(quiet, "model000002.pt")
    step, options = ENDS[end]
    loop = new_loop(*new_model(), data=endless(), resume_checkpoint=good, lr=1e38, weight_decay=10.0,
                    **options, **precision)  # fmt: skip
    if end == "a signal":
        loop.after_step = lambda: os.kill(os.getpid(), signal.SIGTERM) if loop.step else None
    refused(loop.run_loop, f"step {step}: weights are not finite", f"Last good checkpoint: {good}")
    assert sorted(os.listdir(quiet)) == saved


def test_a_non_finite_moving_average_is_never_saved(quiet):
    loop = new_loop(*new_model(), data=endless(), total_steps=3)
    with th.no_grad():
        loop.ema_params[0][0].view(-1)[0] = -math.inf
    refused(loop.run_loop, "step 3: weights are not finite", "ema_0.9_000003.pt", "1 of ", "none yet")
    assert os.listdir(quiet) == []


@pytest.mark.parametrize("name", ["model000002.pt", "ema_0.9_000002.pt"])
def test_resuming_from_non_finite_weights_is_refused(name, quiet):
    new_loop(*new_model(), data=endless(), total_steps=2).run_loop()
    path = os.path.join(quiet, name)
    weights = th.load(path)
    weights["out.2.bias"][0] = math.nan
    th.save(weights, path)
    refused(lambda: new_loop(*new_model(), resume_checkpoint="auto"), f"{path}: 1 of", "the first is out.2.bias")


def test_importance_sampling_ignores_non_finite_losses():
    model, diffusion = new_model(diffusion_steps=4, noise_schedule="cosine")
    sampler = LossSecondMomentResampler(diffusion, history_per_term=2)
    batches = [batch_of(6)] * 6 + [bad_batch()] + [batch_of(6)] * 3
    loop = new_loop(model, diffusion, data=endless(*batches), schedule_sampler=sampler, total_steps=10)
    loop.run_loop()
    assert sampler._loss_counts.min() == 2 and np.isfinite(sampler.weights()).all()


# Gradient clipping


def test_only_gradients_above_max_grad_norm_are_clipped():
    model = th.nn.Linear(2, 1, bias=False)
    trainer = MixedPrecisionTrainer(model=model, max_grad_norm=1.0)
    opt = th.optim.SGD(trainer.master_params, lr=1.0)
    for slope, step in [((3.0, 4.0), (0.6, 0.8)), ((0.3, 0.4), (0.3, 0.4))]:
        before = model.weight.detach().clone()
        trainer.zero_grad()
        trainer.backward((model.weight * th.tensor(slope)).sum())
        trainer.optimize(opt)
        assert th.allclose(before - model.weight, th.tensor([step]), atol=1e-6)
    assert logger.getkvs()["grad_norm"] == pytest.approx((5 + 0.5) / 2)  # logged norms are those before clipping


# Several ranks

PLANTED = """
import json, sys
import helpers
from guided_diffusion import dist_util, logger
dist_util.setup_dist()
rank = dist_util.get_rank()
folder, planted, options = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
logger.configure(folder, format_strs=[])

def batches():
    for step in range(100):
        x = helpers.batch_of(4, seed=10 * step + rank)
        if rank == 1 and step in planted:
            x[0, 0, 0, 0] = float("nan")
        yield x, {}

skipped = []
loop = helpers.new_loop(*helpers.new_model(), batch_size=4, data=batches(), total_steps=10, **options)
loop.after_step = lambda: loop.bad_steps and skipped.append(loop.steps_done)
loop.run_loop()
digest = float(sum(p.detach().double().abs().sum() for p in loop.mp_trainer.master_params))
print(f"\\nrank {rank} skipped {skipped} and ended with {digest!r}", flush=True)
"""


def train_planted(folder, planted, **options):
    """Train on two ranks. At the steps in `planted`, rank 1 gets a batch that contains NaN."""
    return run_ranks(2, [folder, json.dumps(planted), json.dumps(options)], PLANTED)[0]


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_a_bad_batch_on_one_rank_skips_the_step_on_all(precision, tmp_path):
    done = train_planted(tmp_path, [2, 5, 6], max_bad_steps=3, **precision).check()
    ends = sorted(line for line in done.output.splitlines() if line.startswith("rank"))
    assert len(ends) == 2 and all("skipped [2, 5, 6]" in end for end in ends), done.output
    assert ends[0].split("ended with")[1] == ends[1].split("ended with")[1]


@pytest.mark.parametrize("planted, options, words", [
    ([4, 5, 6], dict(max_bad_steps=3), ["step 6:", "3 consecutive steps"]),
    ([], dict(lr=1e38, weight_decay=10.0, max_bad_steps=0), ["step 10: weights are not finite"]),
])  # fmt: skip
def test_divergence_ends_all_ranks_with_one_message(planted, options, words, tmp_path):
    done = train_planted(tmp_path, planted, **options)
    check_refused(done, words, last=False)
    assert not list(tmp_path.glob("*.pt"))


# Full disks


def test_a_full_disk_leaves_the_previous_checkpoint(quiet):
    """A limit on file sizes simulates a full disk: writing a file fails part-way."""
    options = dict(data=endless(), save_interval=2, resume_checkpoint="auto")
    new_loop(*new_model(), **options, total_steps=2).run_loop()
    before = {path.name: path.read_bytes() for path in Path(quiet).iterdir()}
    good = Path(quiet) / "model000002.pt"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The limit is between the sizes of model000004.pt and opt000004.pt, which has two numbers per model parameter.
    resource.setrlimit(resource.RLIMIT_FSIZE, (good.stat().st_size * 3 // 2, limits[1]))
    try:
        loop = new_loop(*new_model(), **options, total_steps=6)
        refused(loop.run_loop, "opt000004.pt: cannot be written (File too large)", good)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in Path(quiet).iterdir()} == before
    new_loop(*new_model(), **options, total_steps=6).run_loop()
    assert (Path(quiet) / "model000006.pt").exists()
