"""The training loop: gradients, averages, learning rates, saving, resuming, logged losses and classifiers."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from helpers import batch_of, copies, new_loop, new_model, randomize

from guided_diffusion import logger, train_util
from guided_diffusion.classifier_util import ClassifierTrainLoop, correct_in_top_k
from guided_diffusion.resample import LossSecondMomentResampler, UniformSampler, create_named_schedule_sampler
from guided_diffusion.script_util import classifier_and_diffusion_defaults, create_classifier_and_diffusion
from guided_diffusion.train_util import TrainLoop, find_resume_checkpoint, log_loss_dict

pytestmark = pytest.mark.usefixtures("quiet", "cpu")


class FixedLoop(TrainLoop):
    """Trains on timesteps and noise that come with the batch."""

    def compute_loss(self, micro, cond):
        return self.diffusion.training_losses(self.model, micro, cond["t"], noise=cond["noise"])["loss"].mean()


def fixed_cond(count):
    g = th.Generator().manual_seed(2)
    return {"t": th.randint(1000, (count,), generator=g), "noise": th.randn(count, 3, 8, 8, generator=g)}


@pytest.mark.parametrize("microbatch", [-1, 1, 2, 3, 4, 6, 7])
def test_microbatches_have_the_gradient_of_the_whole_batch(microbatch):
    model, diffusion = new_model(learn_sigma=True)
    x, cond = batch_of(6), fixed_cond(6)
    losses = diffusion.training_losses(model, x, cond["t"], noise=cond["noise"])
    expected = th.autograd.grad(losses["loss"].mean(), list(model.parameters()))
    loop = new_loop(model, diffusion, kind=FixedLoop, microbatch=microbatch)
    loop.forward_backward(x, cond)
    size = max(float(g.abs().max()) for g in expected)
    for p, g in zip(model.parameters(), expected, strict=True):
        assert float((p.grad - g).abs().max()) < 1e-5 * size
    # A second call starts from zero.
    loop.forward_backward(x, cond)
    for p, g in zip(model.parameters(), expected, strict=True):
        assert float((p.grad - g).abs().max()) < 1e-5 * size


def test_a_batch_shorter_than_batch_size_counts_as_what_it_is():
    model, diffusion = new_model()
    x, cond = batch_of(5), fixed_cond(5)
    gradients = []
    for microbatch in (-1, 2):
        loop = new_loop(model, diffusion, kind=FixedLoop, microbatch=microbatch)
        loop.forward_backward(x, cond)
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients):
        assert th.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_averages_follow_the_weights():
    model, diffusion = new_model()
    loop = new_loop(model, diffusion, kind=FixedLoop, ema_rate="0.5,0.9")
    expected = [copies(model.parameters()) for _ in range(2)]
    for _ in range(3):
        loop.run_step(batch_of(6), fixed_cond(6))
        for rate, params in zip((0.5, 0.9), expected):
            for a, p in zip(params, model.parameters()):
                a.mul_(rate).add_(p.detach(), alpha=1 - rate)
    for params, got in zip(expected, loop.ema_params):
        assert all(th.allclose(a, b, atol=1e-6) for a, b in zip(params, got))


@pytest.mark.parametrize("rates, expected", [(0.5, [0.5]), ("0.9999", [0.9999]), ("0.5, 0.9", [0.5, 0.9]), ("", [])])
def test_ema_rates_parse(rates, expected):
    assert new_loop(*new_model(), ema_rate=rates).ema_rate == expected


class NoLoss(FixedLoop):
    """Steps that cost nothing, and a note of each one's learning rate."""

    def forward_backward(self, batch, cond):
        self.rates = getattr(self, "rates", []) + [self.opt.param_groups[0]["lr"]]
        for p in self.model.parameters():
            p.grad = th.zeros_like(p)


def endless():
    while True:
        yield batch_of(6), {}


def test_learning_rate_falls_linearly_and_ends_the_run(quiet):
    loop = new_loop(*new_model(), kind=NoLoss, data=endless(), lr=0.8, lr_anneal_steps=8)
    loop.run_loop()
    assert loop.steps_done == 8
    # From lr down towards zero in equal parts. A step's end sets the next rate by the steps before it, as the
    # original's does, so that the second still has the whole.
    assert loop.rates == pytest.approx([0.8, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])


def test_learning_rate_is_constant_by_default():
    loop = new_loop(*new_model(), kind=NoLoss, data=endless(), lr=0.8, total_steps=3)
    loop.run_loop()
    assert loop.rates == [0.8] * 3


# Saving and resuming


def test_saving_at_intervals_and_at_the_end(quiet):
    loop = new_loop(*new_model(), kind=NoLoss, data=endless(), total_steps=5, save_interval=2)
    loop.run_loop()
    saved = sorted(name for name in os.listdir(quiet) if name.startswith("model"))
    assert saved == ["model000002.pt", "model000004.pt", "model000005.pt"]


def test_training_without_a_configured_logger_can_save(monkeypatch, tmp_path):
    """Other projects call TrainLoop alone: it must not find out at its first save that there is no folder."""
    logger.reset()
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "default"))
    new_loop(*new_model(), kind=NoLoss, data=endless(), total_steps=1).run_loop()
    assert (tmp_path / "default" / "model000001.pt").exists()


def test_a_save_at_the_very_end_is_not_repeated(quiet, monkeypatch):
    saves = []
    loop = new_loop(*new_model(), kind=NoLoss, data=endless(), total_steps=4, save_interval=2)
    monkeypatch.setattr(loop, "save", lambda: saves.append(loop.steps_done))
    loop.run_loop()
    assert saves == [2, 4]


def test_the_end_of_a_run_that_had_ended_already(quiet):
    new_loop(*new_model(), kind=NoLoss, data=endless(), total_steps=2).run_loop()
    before = os.stat(os.path.join(quiet, "model000002.pt")).st_mtime_ns
    again = os.path.join(quiet, "model000002.pt")
    loop = new_loop(*new_model(), kind=NoLoss, data=endless(), total_steps=2, resume_checkpoint=again)
    loop.run_loop()
    assert loop.steps_done == 2 and not hasattr(loop, "rates")  # no step taken
    assert os.stat(again).st_mtime_ns == before  # and nothing written again


def test_resuming_in_half_precision_is_exact(quiet):
    """The masters, averages and moments come back to the last bit, from the float32 files."""
    model, diffusion = new_model()
    loop = new_loop(model, diffusion, kind=FixedLoop, use_bf16=True)
    for _ in range(2):
        loop.run_step(batch_of(6), fixed_cond(6))
        loop.step += 1
    loop.save()
    other, diffusion = new_model()
    randomize(other, seed=5)
    resumed = new_loop(
        other, diffusion, kind=FixedLoop, use_bf16=True, resume_checkpoint=os.path.join(quiet, "model000002.pt")
    )
    assert resumed.steps_done == 2
    for a, b in zip(loop.mp_trainer.master_params, resumed.mp_trainer.master_params, strict=True):
        assert (a == b).all()
    for a, b in zip(loop.ema_params[0], resumed.ema_params[0], strict=True):
        assert (a == b).all()
    for i in (0, 1):
        for name in ("exp_avg", "exp_avg_sq", "step"):
            a, b = (run.opt.state_dict()["state"][i][name] for run in (loop, resumed))
            assert (a == b).all()
    # And go on as the first run does.
    for run in (loop, resumed):
        run.run_step(batch_of(6), fixed_cond(6))
    assert all((a == b).all() for a, b in zip(loop.mp_trainer.master_params, resumed.mp_trainer.master_params))


def test_what_is_missing_beside_a_checkpoint_is_said(tmp_path, capsys):
    model, diffusion = new_model()
    path = tmp_path / "model000007.pt"
    th.save(model.state_dict(), path)
    logger.configure(str(tmp_path / "run"), format_strs=["stdout"])
    loop = new_loop(model, diffusion, resume_checkpoint=str(path))
    out = capsys.readouterr().out
    assert "no optimiser state" in out and "no moving average 0.9 " in out
    assert loop.steps_done == 7
    assert all((a == b).all() for a, b in zip(loop.ema_params[0], model.parameters()))


def test_a_cluster_may_say_what_to_resume_from(quiet, monkeypatch):
    """Others replace train_util.find_resume_checkpoint; it goes before the flag."""
    assert find_resume_checkpoint() is None
    new_loop(*new_model(), kind=NoLoss, data=endless(), total_steps=2).run_loop()
    found = os.path.join(quiet, "model000002.pt")
    monkeypatch.setattr(train_util, "find_resume_checkpoint", lambda: found)
    assert new_loop(*new_model(), kind=NoLoss, data=endless(), total_steps=3).steps_done == 2


def test_blob_logdir_takes_the_checkpoints(tmp_path, quiet, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("DIFFUSION_BLOB_LOGDIR", str(tmp_path / "elsewhere"))
    new_loop(*new_model(), kind=NoLoss, data=endless(), total_steps=1).run_loop()
    saved = ["ema_0.9_000001.pt", "model000001.pt", "opt000001.pt", "state000001.pt"]
    assert sorted(os.listdir(tmp_path / "elsewhere")) == saved
    assert os.listdir(quiet) == []


# Logged losses


def test_losses_are_logged_by_quartile():
    diffusion = SimpleNamespace(num_timesteps=8)
    ts = th.tensor([0, 1, 2, 3, 7, 6, 5])
    log_loss_dict(diffusion, ts, {"loss": th.tensor([1.0, 3.0, 10.0, 20.0, 5.0, 6.0, 100.0])})
    assert logger.getkvs() == pytest.approx(
        {"loss": 145 / 7, "loss_q0": 2.0, "loss_q1": 15.0, "loss_q2": 100.0, "loss_q3": 5.5}
    )


def test_the_logged_loss_is_the_mean_over_the_batch_however_it_is_split():
    model, diffusion = new_model()
    logged = []
    for microbatch in (-1, 3, 4):  # the last leaves a microbatch of 2
        loop = new_loop(model, diffusion, kind=LoggingLoop, microbatch=microbatch)
        loop.forward_backward(batch_of(6), fixed_cond(6))
        logged.append(logger.dumpkvs()["loss"])
    assert logged[1:] == pytest.approx([logged[0]] * 2, rel=1e-5)


class LoggingLoop(FixedLoop):
    """Also logs its losses."""

    def compute_loss(self, micro, cond):
        losses = self.diffusion.training_losses(self.model, micro, cond["t"], noise=cond["noise"])
        log_loss_dict(self.diffusion, cond["t"], losses)
        return losses["loss"].mean()


# Timesteps to train on


def test_schedule_samplers_by_name():
    diffusion = SimpleNamespace(num_timesteps=4)
    assert type(create_named_schedule_sampler("uniform", diffusion)) is UniformSampler
    assert type(create_named_schedule_sampler("loss-second-moment", diffusion)) is LossSecondMomentResampler


def test_importance_sampling_leaves_the_mean_as_it_is():
    """The weighted mean over draws estimates the plain mean over timesteps, whatever the distribution."""
    sampler = LossSecondMomentResampler(SimpleNamespace(num_timesteps=4), history_per_term=3)
    values = np.array([1.0, 2.0, 5.0, 20.0])
    sampler.update_with_all_losses([t for t in range(4) for _ in range(3)], np.repeat(values, 3).tolist())
    p = sampler.weights() / sampler.weights().sum()
    np.testing.assert_allclose(p, 0.999 * values / values.sum() + 0.001 / 4, rtol=1e-12)
    ts, factors = sampler.sample(20000, "cpu", rng=np.random.default_rng(0))
    assert ts.dtype == th.int64 and factors.dtype == th.float32
    counts = np.bincount(ts.numpy(), minlength=4) / 20000
    assert np.abs(counts - p).max() < 0.02
    estimate = float((th.from_numpy(values)[ts] * factors).mean())
    assert estimate == pytest.approx(values.mean(), rel=0.01)


def test_only_the_latest_losses_count():
    sampler = LossSecondMomentResampler(SimpleNamespace(num_timesteps=2), history_per_term=2, uniform_prob=0.0)
    sampler.update_with_all_losses([0, 0], [1.0, 1.0])
    assert sampler.weights().tolist() == [1, 1]  # not enough of timestep 1 yet
    sampler.update_with_all_losses([1, 1, 1, 1], [50.0, 60.0, 3.0, 1.0])
    p = sampler.weights() / sampler.weights().sum()
    np.testing.assert_allclose(p, [1 / (1 + 5**0.5), 5**0.5 / (1 + 5**0.5)])  # sqrt((9 + 1) / 2)


def test_uniform_sampler():
    ts, factors = UniformSampler(SimpleNamespace(num_timesteps=5)).sample(1000, "cpu")
    assert set(ts.tolist()) == set(range(5)) and th.allclose(factors, th.ones(1000))


# Classifiers


def new_classifier_loop(**options):
    flags = dict(image_size=8, num_classes=3, classifier_width=64, classifier_depth=1,
                 classifier_attention_resolutions="4")  # fmt: skip
    model, diffusion = create_classifier_and_diffusion(**{**classifier_and_diffusion_defaults(), **flags})
    randomize(model)
    return new_loop(model, diffusion, kind=ClassifierTrainLoop, iterations=4, **options)


def test_top_k():
    logits = th.tensor([[0.1, 0.5, 0.4], [0.9, 0.0, 0.1]])
    labels = th.tensor([2, 1])
    assert correct_in_top_k(logits, labels, 1).tolist() == [0, 0]
    assert correct_in_top_k(logits, labels, 2).tolist() == [1, 0]
    assert correct_in_top_k(logits, labels, 5).tolist() == [1, 1]  # fewer classes than k


def test_classifier_learning_rate_and_iterations():
    class Rates(ClassifierTrainLoop):
        def forward_backward(self, batch, cond):
            NoLoss.forward_backward(self, batch, cond)

    loop = new_classifier_loop(anneal_lr=True, lr=0.8, data=endless())
    loop.__class__ = Rates
    loop.run_loop()
    assert loop.rates == pytest.approx([0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("noised", [True, False])
def test_classifier_loss_is_the_cross_entropy_of_noised_images(noised):
    loop = new_classifier_loop(noised=noised, microbatch=3)
    x, y = batch_of(6), th.tensor([0, 1, 2, 0, 1, 2])
    np.random.seed(0)
    batch, cond = loop.prepare(x, {"y": y})
    assert (cond["t"] == 0).all() != noised
    assert (batch == x).all() != noised
    loop.prepare = lambda *_: (batch, cond)
    loop.forward_backward(x, {"y": y})
    logits = loop.model(batch, cond["t"])
    expected = -logits.log_softmax(1)[th.arange(6), y].mean()
    assert logger.getkvs()["train_loss"] == pytest.approx(expected.item(), rel=1e-5)
    for p, g in zip(loop.model.parameters(), th.autograd.grad(expected, list(loop.model.parameters()))):
        assert th.allclose(p.grad, g, rtol=1e-3, atol=1e-5)
