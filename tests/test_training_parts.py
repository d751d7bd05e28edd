"""The parts of training and sampling, each by itself in one process."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from PIL import Image

from guided_diffusion import checkpoint_util, dist_util, files, logger, train_util
from guided_diffusion.checkpoint_util import adopt_config
from guided_diffusion.classifier_util import ClassifierTrainLoop, correct_in_top_k
from guided_diffusion.errors import InputError
from guided_diffusion.fp16_util import MixedPrecisionTrainer
from guided_diffusion.nn import update_ema
from guided_diffusion.random_util import SampleNoise, random_labels, seed_everything
from guided_diffusion.resample import LossSecondMomentResampler, UniformSampler, create_named_schedule_sampler
from guided_diffusion.sample_util import choose_labels, save_grid, save_samples, to_uint8
from guided_diffusion.script_util import (
    classifier_and_diffusion_defaults,
    create_classifier_and_diffusion,
    create_model_and_diffusion,
    identity_flags,
    model_and_diffusion_defaults,
)
from guided_diffusion.train_util import (
    TrainLoop,
    find_ema_checkpoint,
    find_resume_checkpoint,
    log_loss_dict,
    parse_resume_step_from_filename,
)


@pytest.fixture(autouse=True)
def quiet(tmp_path):
    """A run's folder of its own, without any output in it but checkpoints; the same random numbers for each test."""
    logger.configure(str(tmp_path / "run"), format_strs=[])
    seed_everything(0)
    yield str(tmp_path / "run")
    logger.reset()


@pytest.fixture(autouse=True, scope="module")
def cpu():
    """The CPU, also where there is a GPU, and one thread: small networks lose time to threads that wait."""
    before = th.get_num_threads()
    th.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist_util, "dev", lambda: th.device("cpu"))
        yield
    th.set_num_threads(before)


def new_model(**options):
    """A small UNet with random weights throughout, and its process."""
    options = dict(image_size=8, num_channels=32, channel_mult="1", num_res_blocks=1, num_heads=2,
                   attention_resolutions="8", **options)  # fmt: skip
    model, diffusion = create_model_and_diffusion(**{**model_and_diffusion_defaults(), **options})
    randomize(model)
    return model, diffusion


def randomize(model, seed=0):
    g = th.Generator().manual_seed(seed)
    with th.no_grad():
        for p in model.parameters():
            p.copy_(th.randn(p.shape, generator=g) * (0.05 if p.ndim > 1 else 0.3))


def batch_of(count, seed=1):
    g = th.Generator().manual_seed(seed)
    return th.rand(count, 3, 8, 8, generator=g) * 2 - 1


def new_loop(model, diffusion, kind=TrainLoop, **options):
    options = {**dict(data=None, batch_size=6, microbatch=-1, lr=1e-3, log_interval=1, save_interval=100,
                      resume_checkpoint=""), **options}  # fmt: skip
    if kind is not ClassifierTrainLoop:
        options.setdefault("ema_rate", "0.9")
    return kind(model=model, diffusion=diffusion, **options)


def copies(params):
    return [p.detach().clone() for p in params]


# Mixed precision


def test_float32_masters_are_the_model_s_own_parameters():
    model, _ = new_model()
    trainer = MixedPrecisionTrainer(model=model)
    assert all(a is b for a, b in zip(trainer.master_params, model.parameters(), strict=True))
    state_dict = trainer.master_params_to_state_dict(trainer.master_params)
    assert list(state_dict) == list(model.state_dict())
    for a, b in zip(trainer.state_dict_to_master_params(state_dict), model.parameters(), strict=True):
        assert (a == b).all()


@pytest.mark.parametrize("kind, dtype", [("use_fp16", th.float16), ("use_bf16", th.bfloat16)])
def test_half_precision_masters(kind, dtype):
    model, _ = new_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = MixedPrecisionTrainer(model=model, **{kind: True})

    # Two flat parameters, vectors first: the original's optimiser files have this layout.
    vectors = sum(v.numel() for v in before.values() if v.ndim <= 1)
    matrices = sum(v.numel() for v in before.values() if v.ndim > 1)
    assert [tuple(p.shape) for p in trainer.master_params] == [(vectors,), (1, matrices)]
    assert all(p.dtype == th.float32 for p in trainer.master_params)
    flat = th.cat([v.reshape(-1) for v in before.values() if v.ndim <= 1])
    assert (trainer.master_params[0] == flat).all()

    # The torso's convolutions are converted; the output and embeddings are not.
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert dtypes["input_blocks.0.0.weight"] == dtypes["middle_block.1.qkv.weight"] == dtype
    assert dtypes["out.2.weight"] == dtypes["time_embed.0.weight"] == dtypes["out.0.weight"] == th.float32

    # What is saved is float32 under the model's names, with nothing lost to rounding.
    state_dict = trainer.master_params_to_state_dict(trainer.master_params)
    assert list(state_dict) == list(before)
    for name, value in state_dict.items():
        assert value.dtype == th.float32 and value.shape == before[name].shape
        assert (value == before[name]).all(), name
    for a, b in zip(trainer.state_dict_to_master_params(state_dict), trainer.master_params, strict=True):
        assert a.shape == b.shape and (a == b).all()


def test_half_precision_optimizer_state_has_two_parameters():
    model, diffusion = new_model()
    loop = new_loop(model, diffusion, use_fp16=True, initial_lg_loss_scale=4.0)  # too low for an overflow
    loop.run_step(batch_of(6), {})
    state = loop.opt.state_dict()
    assert len(state["param_groups"]) == 1 and state["param_groups"][0]["params"] == [0, 1]
    assert [state["state"][i]["exp_avg"].shape for i in (0, 1)] == [p.shape for p in loop.mp_trainer.master_params]


class Line(th.nn.Module):
    """y = w x + b, with what MixedPrecisionTrainer asks of a model; nothing is converted."""

    def __init__(self):
        super().__init__()
        self.w = th.nn.Parameter(th.tensor([[2.0]]))
        self.b = th.nn.Parameter(th.tensor([1.0]))

    def convert_to_fp16(self):
        pass

    convert_to_bf16 = convert_to_fp16


def step_of(trainer, opt, w_gradient):
    trainer.zero_grad()
    trainer.backward((trainer.model.w * w_gradient).sum())
    return trainer.optimize(opt)


def test_loss_scale_leaves_the_step_as_it_is():
    model = Line()
    trainer = MixedPrecisionTrainer(model=model, use_fp16=True, initial_lg_loss_scale=10.0)
    opt = th.optim.SGD(trainer.master_params, lr=0.5)
    trainer.zero_grad()
    trainer.backward((model.w * 3.0).sum())
    assert model.w.grad.item() == 3.0 * 2**10
    assert trainer.optimize(opt) is True
    assert model.w.item() == 2.0 - 0.5 * 3.0
    assert model.b.item() == 1.0  # no gradient counts as zero
    assert logger.getkvs()["grad_norm"] == pytest.approx(3.0)
    assert logger.getkvs()["param_norm"] == pytest.approx(5**0.5)
    assert logger.getkvs()["lg_loss_scale"] == 10.0


def test_overflow_skips_the_step_and_lowers_the_scale():
    model = Line()
    trainer = MixedPrecisionTrainer(model=model, use_fp16=True, initial_lg_loss_scale=10.0, fp16_scale_growth=0.25)
    opt = th.optim.AdamW(trainer.master_params, lr=0.5)
    for bad in (float("inf"), float("nan")):
        before = trainer.lg_loss_scale
        assert step_of(trainer, opt, bad) is False
        assert trainer.lg_loss_scale == before - 1
        assert (model.w.item(), model.b.item()) == (2.0, 1.0)
        assert not opt.state  # the optimiser saw nothing of it
    # Every good step adds a little.
    assert step_of(trainer, opt, 1.0) is True
    assert step_of(trainer, opt, 1.0) is True
    assert trainer.lg_loss_scale == 8.0 + 2 * 0.25
    assert model.w.item() < 2.0


def test_bfloat16_has_no_loss_scale_and_skips_what_is_not_finite():
    model = Line()
    trainer = MixedPrecisionTrainer(model=model, use_bf16=True)
    opt = th.optim.SGD(trainer.master_params, lr=0.5)
    trainer.zero_grad()
    trainer.backward((model.w * 3.0).sum())
    assert model.w.grad.item() == 3.0
    assert trainer.optimize(opt) is True
    assert model.w.item() == 0.5
    assert step_of(trainer, opt, float("nan")) is False
    assert model.w.item() == 0.5
    assert "lg_loss_scale" not in logger.getkvs()


@pytest.mark.parametrize("kind", ["use_fp16", "use_bf16"])
def test_small_updates_add_up_in_the_masters(kind):
    # A step of 1e-4 on weights near 1 is lost in half precision; only float32 masters keep it.
    model, _ = new_model()
    with th.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    trainer = MixedPrecisionTrainer(model=model, initial_lg_loss_scale=0.0, **{kind: True})
    opt = th.optim.SGD(trainer.master_params, lr=1e-4)
    for _ in range(10):
        for p in model.parameters():
            p.grad = th.ones_like(p)
        assert trainer.optimize(opt)
    name = "input_blocks.0.0.weight"
    saved = trainer.master_params_to_state_dict(trainer.master_params)[name]
    assert th.allclose(saved, th.full_like(saved, 0.999), atol=1e-6)
    used = dict(model.named_parameters())[name]
    assert (used == th.tensor(0.999).to(used.dtype)).all()  # the network has the masters' values, rounded


@pytest.mark.parametrize("kind", ["use_fp16", "use_bf16"])
def test_skipped_steps_leave_the_average_alone(kind):
    model, diffusion = new_model()
    loop = new_loop(model, diffusion, **{kind: True})
    before = copies(loop.ema_params[0])
    x = batch_of(6)
    x[3, 0, 0, 0] = float("nan")
    loop.run_step(x, {})
    assert all((a == b).all() for a, b in zip(before, loop.ema_params[0]))
    assert all((a == b).all() for a, b in zip(before, loop.mp_trainer.master_params))


# The loop


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


def test_ema_formula():
    target, source = [th.tensor([1.0, 2.0]), th.tensor([[4.0]])], [th.tensor([3.0, 3.0]), th.tensor([[0.0]])]
    update_ema(target, source, rate=0.75)
    assert target[0].tolist() == [1.5, 2.25] and target[1].tolist() == [[3.0]]
    assert source[0].tolist() == [3.0, 3.0]


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


def test_blob_logdir_takes_the_checkpoints(tmp_path, quiet, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("DIFFUSION_BLOB_LOGDIR", str(tmp_path / "elsewhere"))
    new_loop(*new_model(), kind=NoLoss, data=endless(), total_steps=1).run_loop()
    assert sorted(os.listdir(tmp_path / "elsewhere")) == ["ema_0.9_000001.pt", "model000001.pt", "opt000001.pt"]
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


# Checkpoint files


@pytest.mark.parametrize(
    "name, step",
    [
        ("model012000.pt", 12000),
        ("/a/model1/model000005.pt", 5),
        ("gs://bucket/model1000000.pt", 1000000),
        ("ema_0.9999_012000.pt", 0),
        ("model.pt", 0),
        ("64x64_diffusion.pt", 0),
        ("my_model000010.pt", 10),
    ],
)
def test_resume_step_from_a_name(name, step):
    assert parse_resume_step_from_filename(name) == step


def test_find_ema_checkpoint(tmp_path):
    (tmp_path / "ema_0.9999_000012.pt").write_bytes(b"")
    main = str(tmp_path / "model000012.pt")
    assert find_ema_checkpoint(main, 12, "0.9999") == str(tmp_path / "ema_0.9999_000012.pt")
    assert find_ema_checkpoint(main, 12, 0.9999) == str(tmp_path / "ema_0.9999_000012.pt")
    assert find_ema_checkpoint(main, 13, "0.9999") is None
    assert find_ema_checkpoint(main, 12, "0.5") is None
    assert find_ema_checkpoint(None, 12, "0.9999") is None


def test_a_cluster_may_say_what_to_resume_from(quiet, monkeypatch):
    """Others replace train_util.find_resume_checkpoint; it goes before the flag."""
    assert find_resume_checkpoint() is None
    new_loop(*new_model(), kind=NoLoss, data=endless(), total_steps=2).run_loop()
    found = os.path.join(quiet, "model000002.pt")
    monkeypatch.setattr(train_util, "find_resume_checkpoint", lambda: found)
    assert new_loop(*new_model(), kind=NoLoss, data=endless(), total_steps=3).steps_done == 2


def test_atomic_writes(quiet):
    path = os.path.join(quiet, "file")
    with files.write_atomically(path) as f:
        f.write(b"first")
        assert not os.path.exists(path)  # not before it is whole
    with pytest.raises(ZeroDivisionError):
        with files.write_atomically(path) as f:
            f.write(b"half of the sec")
            1 / 0
    assert open(path, "rb").read() == b"first"
    assert os.listdir(quiet) == ["file"]  # nothing half-done stays
    with files.write_atomically(path) as f:
        f.write(b"second")
    assert open(path, "rb").read() == b"second"


def test_a_save_that_fails_leaves_the_old_checkpoint(quiet):
    checkpoint_util.save({"a": th.ones(2)}, "model000001.pt")
    with pytest.raises(Exception, match="pickle"):
        checkpoint_util.save({"a": lambda: None}, "model000001.pt")
    assert os.listdir(quiet) == ["model000001.pt"]
    assert th.load(os.path.join(quiet, "model000001.pt"))["a"].tolist() == [1, 1]


# The record beside a checkpoint


def test_config_is_read_back(quiet):
    checkpoint = os.path.join(quiet, "model000001.pt")
    assert checkpoint_util.read_config(checkpoint) is None
    checkpoint_util.write_config({"num_channels": 32, "channel_mult": "1,2"}, kind="diffusion")
    config = checkpoint_util.read_config(checkpoint)
    assert config["flags"] == {"num_channels": 32, "channel_mult": "1,2"}
    assert config["kind"] == "diffusion" and config["world_size"] == 1


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"flags": 3}', "\x00\xff"])
def test_damaged_config(content, quiet):
    with open(os.path.join(quiet, "config.json"), "w", encoding="latin-1") as f:
        f.write(content)
    with pytest.raises(InputError, match="config.json"):
        checkpoint_util.read_config(os.path.join(quiet, "model000001.pt"))


def write_record(folder, **flags):
    folder.mkdir()
    (folder / "model.pt").write_bytes(b"")
    (folder / "config.json").write_text(json.dumps({"flags": flags}))
    return str(folder / "model.pt")


def test_adopt_config(tmp_path):
    path = write_record(tmp_path / "model", width=10, depth=20, seed=30, levels="1,2")
    args = SimpleNamespace(model_path=path, width=1, depth=2, seed=3, levels="1, 2")
    settled = {"depth": (20, "on the command line"), "levels": ("1, 2", "on the command line")}
    adopt_config(args, settled, "model_path", ["width", "depth", "levels", "unrecorded"])
    assert (args.width, args.depth, args.seed) == (10, 20, 3)  # only what was named
    assert settled["width"][0] == 10
    with pytest.raises(InputError, match="--width 5 on the command line contradicts .*, which says width 10"):
        adopt_config(args, {"width": (5, "on the command line")}, "model_path", ["width"])


def test_a_checkpoint_without_a_record_changes_nothing(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"")
    args = SimpleNamespace(model_path=str(tmp_path / "model.pt"), width=1)
    adopt_config(args, {}, "model_path", ["width"])
    assert args.width == 1


def test_flags_of_running_are_not_adopted():
    """How a model was run in training says nothing about how to run it in sampling."""
    names = identity_flags(model_and_diffusion_defaults())
    assert {"num_channels", "num_heads", "use_new_attention_order", "noise_schedule", "learn_sigma"} <= set(names)
    assert not {"use_fp16", "use_bf16", "dropout", "timestep_respacing", "use_checkpoint"} & set(names)


def test_classes_of_an_unconditional_model_do_not_bind_its_classifier(tmp_path):
    model = write_record(tmp_path / "model", class_cond=False, num_classes=1000, image_size=16)
    classifier = write_record(tmp_path / "classifier", num_classes=10, image_size=16)
    args = SimpleNamespace(model_path=model, classifier_path=classifier, class_cond=True, num_classes=1, image_size=64)
    settled = {}
    adopt_config(args, settled, "model_path", ["class_cond", "num_classes", "image_size"])
    adopt_config(args, settled, "classifier_path", ["num_classes", "image_size"])
    assert (args.class_cond, args.num_classes, args.image_size) == (False, 10, 16)


def test_a_classifier_of_another_image_size_is_refused(tmp_path):
    model = write_record(tmp_path / "model", image_size=16)
    classifier = write_record(tmp_path / "classifier", image_size=32)
    args = SimpleNamespace(model_path=model, classifier_path=classifier, image_size=64)
    settled = {}
    adopt_config(args, settled, "model_path", ["image_size"])
    with pytest.raises(InputError, match="image_size 16 in .*model.* contradicts .*classifier.*image_size 32"):
        adopt_config(args, settled, "classifier_path", ["image_size"])


# Samples


def test_noise_depends_on_seed_and_index_alone():
    together = SampleNoise(7, [3, 4, 5])
    first, second = together.randn(2, 3), together.randn_like(th.zeros(3, 4))
    assert first.shape == (3, 2, 3) and second.shape == (3, 4)
    alone = SampleNoise(7, [4])
    assert (alone.randn(2, 3)[0] == first[1]).all() and (alone.randn_like(th.zeros(1, 4))[0] == second[1]).all()
    swapped = SampleNoise(7, [5, 3]).randn(2, 3)
    assert (swapped[0] == first[2]).all() and (swapped[1] == first[0]).all()
    for other in (SampleNoise(8, [4]), SampleNoise(7, [1000])):
        assert (other.randn(2, 3) != first[1]).all()
    # torch's own generator has no part in it
    th.manual_seed(0)
    assert (SampleNoise(7, [3]).randn(2, 3)[0] == first[0]).all()


def test_noise_is_standard_normal_and_independent_between_samples():
    x = SampleNoise(0, range(200)).randn(500)
    assert abs(float(x.mean())) < 0.02 and abs(float(x.std()) - 1) < 0.02
    correlation = np.corrcoef(x.numpy())[np.triu_indices(200, 1)]
    assert np.abs(correlation).max() < 0.3  # 6.7 standard deviations
    assert (SampleNoise(0, range(3)).randn_like(th.zeros(3, 2, dtype=th.float64))).dtype == th.float64
    # (seed, index) is no sum: sample 1 of seed 0 is not sample 0 of seed 1.
    assert (SampleNoise(0, [1]).randn(4) != SampleNoise(1, [0]).randn(4)).all()


def test_labels_depend_on_seed_and_index_alone():
    labels = random_labels(5, range(3000), 10)
    assert labels.dtype == th.int64 and (random_labels(5, [7, 11], 10) == labels[[7, 11]]).all()
    counts = np.bincount(labels.numpy(), minlength=10)
    assert len(counts) == 10 and np.abs(counts - 300).max() < 100  # 6 standard deviations
    assert (random_labels(6, range(3000), 10) != labels).float().mean() > 0.8


def test_choose_labels():
    assert (choose_labels("", 50, 10, seed=3) == random_labels(3, range(50), 10)).all()
    assert choose_labels("balanced", 7, 3, seed=0).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert choose_labels("207,360", 5, 1000, seed=0).tolist() == [207, 360, 207, 360, 207]
    assert choose_labels("4", 2, 5, seed=0).tolist() == [4, 4]
    assert all(choose_labels(c, 3, 10, seed=0).dtype == th.int64 for c in ("", "balanced", "1,2"))
    for classes in ("5", "0,7", "-1"):
        with pytest.raises(InputError, match=r"0\.\.4"):
            choose_labels(classes, 3, 5, seed=0)


@pytest.mark.parametrize("classes", [" ", ",", "1,", "1.5", "all"])
def test_classes_that_do_not_parse(classes):
    with pytest.raises(InputError, match="--classes"):
        choose_labels(classes, 3, 5, seed=0)


def test_seeding_differs_between_ranks_and_repeats(monkeypatch):
    def draw(seed, rank):
        monkeypatch.setattr(dist_util, "get_rank", lambda: rank)
        seed_everything(seed)
        return th.rand(1).item(), np.random.rand()

    assert draw(1, 0) == draw(1, 0)
    values = [draw(1, 0), draw(1, 1), draw(2, 0)]
    assert len({v[0] for v in values}) == len({v[1] for v in values}) == 3
    th.manual_seed(0)
    expected = th.rand(1).item()
    th.manual_seed(0)
    seed_everything(-1)  # a negative seed leaves the generators alone
    assert th.rand(1).item() == expected


def test_to_uint8():
    x = th.tensor([-1.0, 1.0, 0.0, -3.0, 2.0, 0.5]).reshape(2, 1, 1, 3)
    out = to_uint8(x)
    assert out.shape == (2, 1, 3, 1) and out.dtype == th.uint8
    assert out.flatten().tolist() == [0, 255, 127, 0, 255, 191]
    # channels last
    x = th.stack([th.full((2, 2), v) for v in (-1.0, 0.0, 1.0)])[None]
    assert to_uint8(x)[0, 1, 1].tolist() == [0, 127, 255]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_sample_that_is_not_finite_is_named(bad):
    x = th.zeros(4, 3, 2, 2)
    x[2, 1, 0, 1] = bad
    with pytest.raises(InputError, match="sample 102 is not finite"):
        to_uint8(x, start=100)


def read_grid(path, size=64):
    """The top left pixel of every cell of a grid of images of a size: [rows, columns, C]."""
    with Image.open(path) as picture:
        arr = np.asarray(picture)
    arr = arr if arr.ndim == 3 else arr[..., None]
    return arr[:: size + 1, :: size + 1], arr.shape


def test_grid_puts_a_class_in_each_row(tmp_path):
    labels = np.array([7, 3, 7, 3, 3])
    images = np.stack([np.full((64, 64, 3), 10 * i, np.uint8) for i in range(5)])
    save_grid(str(tmp_path / "grid.png"), images, labels)
    cells, shape = read_grid(tmp_path / "grid.png")
    assert shape == (2 * 64 + 1, 3 * 64 + 2, 3)
    assert cells[..., 0].tolist() == [[10, 30, 40], [0, 20, 255]]  # class 3, class 7 and a blank


def test_grid_without_labels_is_a_square_in_order(tmp_path):
    images = np.stack([np.full((64, 64, 1), 10 * i, np.uint8) for i in range(7)])
    save_grid(str(tmp_path / "grid.png"), images)
    cells, _ = read_grid(tmp_path / "grid.png")
    assert cells[..., 0].tolist() == [[0, 10, 20], [30, 40, 50], [60, 255, 255]]


def test_grid_of_many_shows_the_first(tmp_path):
    images = np.arange(300, dtype=np.uint16)[:, None, None, None].repeat(64, 1).repeat(64, 2) // 2
    save_grid(str(tmp_path / "grid.png"), images.astype(np.uint8))
    cells, _ = read_grid(tmp_path / "grid.png")
    assert cells.shape[:2] == (16, 16) and cells[..., 0].flatten().tolist() == [i // 2 for i in range(256)]


def test_small_images_are_enlarged(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    save_grid(str(tmp_path / "grid.png"), images)
    with Image.open(tmp_path / "grid.png") as picture:
        arr = np.asarray(picture)
    assert arr.shape == (4 * 33, 4 * 33, 3)
    assert (arr[:64, :64] == images[0].repeat(4, 0).repeat(4, 1)).all()


def test_save_samples(quiet):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    save_samples(images, th.tensor([2, 0, 1]))
    assert sorted(os.listdir(quiet)) == ["samples_3x8x8x3.npz", "samples_3x8x8x3.png"]
    with np.load(os.path.join(quiet, "samples_3x8x8x3.npz")) as f:
        assert sorted(f) == ["arr_0", "arr_1"]
        assert (f["arr_0"] == images).all() and f["arr_1"].tolist() == [2, 0, 1]
    save_samples(images)
    with np.load(os.path.join(quiet, "samples_3x8x8x3.npz")) as f:
        assert sorted(f) == ["arr_0"]
