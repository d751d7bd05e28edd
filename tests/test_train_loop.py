"""The training loop: gradients, moving averages, learning rates, saving, resuming and metrics."""

import csv
import os
import time
from types import SimpleNamespace

import pytest
import torch as th
from helpers import batch_of, endless, new_loop, new_model, randomize, refused

from guided_diffusion import logger, train_util
from guided_diffusion.train_util import TrainLoop, find_resume_checkpoint, log_loss_dict
from guided_diffusion.training_metrics import Throughput

pytestmark = pytest.mark.usefixtures("quiet", "cpu")


class FixedLoop(TrainLoop):
    """A training loop that takes timesteps and noise from the batch instead of drawing them at random."""

    def compute_loss(self, micro, cond):
        losses = self.diffusion.training_losses(self.model, micro, cond["t"], noise=cond["noise"])
        log_loss_dict(self.diffusion, cond["t"], losses)
        return losses["loss"].mean()


def fixed_cond(count):
    g = th.Generator().manual_seed(2)
    return {"t": th.randint(1000, (count,), generator=g), "noise": th.randn(count, 3, 8, 8, generator=g)}


@pytest.mark.parametrize("count", [6, 5])  # a batch may be smaller than batch_size
@pytest.mark.parametrize("microbatch", [-1, 1, 2, 3, 4, 7])
def test_microbatches_give_the_gradient_and_the_logged_loss_of_the_whole_batch(microbatch, count):
    model, diffusion = new_model(learn_sigma=True)
    x, cond = batch_of(count), fixed_cond(count)
    losses = diffusion.training_losses(model, x, cond["t"], noise=cond["noise"])
    expected = th.autograd.grad(losses["loss"].mean(), list(model.parameters()))
    loop = new_loop(model, diffusion, kind=FixedLoop, microbatch=microbatch)
    loop.forward_backward(x, cond)
    loop.forward_backward(x, cond)  # the second call must reset the gradients of the first
    size = max(float(g.abs().max()) for g in expected)
    for p, g in zip(model.parameters(), expected, strict=True):
        assert float((p.grad - g).abs().max()) < 1e-5 * size
    assert logger.dumpkvs()["loss"] == pytest.approx(losses["loss"].mean().item(), rel=1e-5)


@pytest.mark.parametrize("rates, expected", [(0.5, [0.5]), ("0.9999", [0.9999]), ("0.5, 0.9", [0.5, 0.9]), ("", [])])
def test_ema_rates_are_parsed(rates, expected):
    assert new_loop(*new_model(), ema_rate=rates).ema_rate == expected


class NoLoss(FixedLoop):
    """A training loop that has zero gradients and records the learning rate of each step."""

    def forward_backward(self, batch, cond):
        self.rates = getattr(self, "rates", []) + [self.opt.param_groups[0]["lr"]]
        for p in self.model.parameters():
            p.grad = th.zeros_like(p)


# The original set the learning rate after each step, so both step 0 and step 1 have the full rate.
FALLING = [0.8, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
RATES = {"constant": (dict(total_steps=3), [0.8] * 3), "annealed": (dict(lr_anneal_steps=8), FALLING),
         "warmed up": (dict(lr_anneal_steps=8, warmup_steps=4),
                       [r * w for r, w in zip(FALLING, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1])])}  # fmt: skip


@pytest.mark.parametrize("name", RATES)
def test_learning_rate_schedules(name):
    options, expected = RATES[name]
    loop = new_loop(*new_model(), kind=NoLoss, data=endless(), lr=0.8, **options)
    loop.run_loop()
    assert loop.rates == pytest.approx(expected) and loop.steps_done == len(expected)


# Saving and resuming


def checkpoints(folder, kind=""):
    return sorted(name for name in os.listdir(folder) if name.endswith(".pt") and name.startswith(kind))


@pytest.mark.parametrize("total, steps", [(5, [2, 4, 5]), (4, [2, 4])])
def test_checkpoints_are_saved_at_intervals_and_once_at_the_end(total, steps, monkeypatch):
    saves = []
    loop = new_loop(*new_model(), kind=NoLoss, data=endless(), total_steps=total, save_interval=2)
    monkeypatch.setattr(loop, "save", lambda: saves.append(loop.steps_done))
    loop.run_loop()
    assert saves == steps


def test_only_the_newest_checkpoints_are_kept(quiet):
    loop = new_loop(*new_model(), kind=NoLoss, data=endless(), total_steps=9, save_interval=2, keep_checkpoints=2,
                    ema_rate="0.9,0.99")  # fmt: skip
    th.save({}, os.path.join(quiet, "opt000001.pt"))  # an incomplete checkpoint left by a crash
    th.save({}, os.path.join(quiet, "model000900.pt"))  # a checkpoint of another run in the same folder
    loop.run_loop()
    kinds = ("ema_0.99_", "ema_0.9_", "model", "opt", "state")
    assert checkpoints(quiet) == sorted([f"{k}{s:06d}.pt" for k in kinds for s in (8, 9)] + ["model000900.pt"])


def test_training_without_a_configured_logger_can_save(monkeypatch, tmp_path):
    """If a project has not configured the logger, TrainLoop saves checkpoints in the folder OPENAI_LOGDIR."""
    logger.reset()
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "default"))
    new_loop(*new_model(), kind=NoLoss, data=endless(), total_steps=1).run_loop()
    assert (tmp_path / "default" / "model000001.pt").exists()


def test_resuming_a_finished_run_takes_no_steps(quiet):
    new_loop(*new_model(), kind=NoLoss, data=endless(), total_steps=2).run_loop()
    path = os.path.join(quiet, "model000002.pt")
    before = os.stat(path).st_mtime_ns
    loop = new_loop(*new_model(), kind=NoLoss, data=endless(), total_steps=2, resume_checkpoint=path)
    loop.run_loop()
    assert loop.steps_done == 2 and not hasattr(loop, "rates")  # the loop took no step
    assert os.stat(path).st_mtime_ns == before


@pytest.mark.parametrize("precision", [{}, {"use_bf16": True}], ids=str)
def test_resuming_is_exact(precision, quiet):
    """Master parameters, moving averages and Adam moments are restored bitwise from float32 files."""
    loop = new_loop(*new_model(), kind=FixedLoop, **precision)
    for _ in range(2):
        loop.run_step(batch_of(6), fixed_cond(6))
        loop.step += 1
    loop.save()
    other, diffusion = new_model()
    randomize(other, seed=5)
    path = os.path.join(quiet, "model000002.pt")
    resumed = new_loop(other, diffusion, kind=FixedLoop, resume_checkpoint=path, **precision)
    assert resumed.steps_done == 2
    for more_steps in range(2):  # compare after loading and after one more step
        for run in (loop, resumed) if more_steps else ():
            run.run_step(batch_of(6), fixed_cond(6))
        kept, restored = (
            [*run.model.parameters(), *run.mp_trainer.master_params, *run.ema_params[0]]
            + [v for state in run.opt.state_dict()["state"].values() for _, v in sorted(state.items())]
            for run in (loop, resumed)
        )
        assert all(th.equal(a, b) for a, b in zip(kept, restored, strict=True))


def test_missing_files_next_to_a_checkpoint_are_named(tmp_path, capsys):
    model, diffusion = new_model()
    path = tmp_path / "model000007.pt"
    th.save(model.state_dict(), path)
    logger.configure(str(tmp_path / "run"), format_strs=["stdout"])
    loop = new_loop(model, diffusion, resume_checkpoint=str(path))
    out = capsys.readouterr().out
    assert "no optimiser state" in out and "no moving average 0.9 " in out
    assert loop.steps_done == 7
    assert all((a == b).all() for a, b in zip(loop.ema_params[0], model.parameters()))


def test_resuming_from_an_optimizer_or_ema_file_is_refused(quiet):
    new_loop(*new_model(), kind=NoLoss, data=endless(), total_steps=2).run_loop()
    for name in ("ema_0.9_000002.pt", "opt000002.pt", "state000002.pt"):
        path = os.path.join(quiet, name)
        refused(lambda: new_loop(*new_model(), resume_checkpoint=path), path, os.path.join(quiet, "model000002.pt"))


def test_find_resume_checkpoint_can_be_replaced(quiet, monkeypatch):
    """Projects replace train_util.find_resume_checkpoint. Its result takes precedence over --resume_checkpoint."""
    assert find_resume_checkpoint() is None
    new_loop(*new_model(), kind=NoLoss, data=endless(), total_steps=2).run_loop()
    found = os.path.join(quiet, "model000002.pt")
    monkeypatch.setattr(train_util, "find_resume_checkpoint", lambda: found)
    assert new_loop(*new_model(), kind=NoLoss, data=endless(), total_steps=3).steps_done == 2


def test_checkpoints_are_saved_in_blob_logdir(tmp_path, quiet, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("DIFFUSION_BLOB_LOGDIR", str(tmp_path / "elsewhere"))
    new_loop(*new_model(), kind=NoLoss, data=endless(), total_steps=1).run_loop()
    assert checkpoints(tmp_path / "elsewhere") == [f"{k}000001.pt" for k in ("ema_0.9_", "model", "opt", "state")]
    assert os.listdir(quiet) == []


# Metrics


def test_losses_are_logged_by_quartile_of_the_timesteps():
    diffusion = SimpleNamespace(num_timesteps=8)
    ts = th.tensor([0, 1, 2, 3, 7, 6, 5])
    log_loss_dict(diffusion, ts, {"loss": th.tensor([1.0, 3.0, 10.0, 20.0, 5.0, 6.0, 100.0])})
    assert logger.getkvs() == pytest.approx(
        {"loss": 145 / 7, "loss_q0": 2.0, "loss_q1": 15.0, "loss_q2": 100.0, "loss_q3": 5.5}
    )


class NoWork(TrainLoop):
    """A training loop whose steps take a known time and do not change the weights."""

    def run_step(self, batch, cond):
        time.sleep(0.03)
        self.log_step()


def test_every_logged_row_has_the_throughput(tmp_path):
    logger.configure(str(tmp_path), format_strs=["csv"])
    new_loop(*new_model(), kind=NoWork, data=endless(seconds=0.03), total_steps=22, log_interval=5).run_loop()
    with open(tmp_path / "progress.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [row["step"] for row in rows] == ["0", "5", "10", "15", "20"]
    for row in rows[1:]:
        rate = float(row["steps_per_s"])
        assert 5 < rate < 1 / 0.06
        assert float(row["images_per_s"]) == pytest.approx(6 * rate)
        assert 0.3 < float(row["data_wait"]) < 0.7  # waiting for data takes half of each step
        assert 50 < float(row["memory_mb"]) < 1e5
    assert rows[-1]["eta"] == "0:00:00"  # less than a second is left


def test_eta_is_the_time_for_the_remaining_steps():
    throughput = Throughput()
    throughput.start -= 10
    throughput.steps = 5
    metrics = throughput.metrics(images_per_step=8, steps_left=1800)
    assert metrics["steps_per_s"] == pytest.approx(0.5, rel=0.01) and metrics["eta"].startswith(("1:00:0", "0:59:5"))
    assert "eta" not in throughput.metrics(images_per_step=8)  # a run without total_steps has no ETA


def test_a_run_without_total_steps_logs_that_it_does_not_end(capsys, tmp_path):
    logger.configure(str(tmp_path), format_strs=["stdout"])
    with pytest.raises(StopIteration):
        new_loop(*new_model(), kind=NoLoss, data=iter([])).run_loop()
    assert "this run has no end" in capsys.readouterr().out
