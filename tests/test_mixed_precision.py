"""Half-precision training: float32 master parameters, the loss scale and skipped steps."""

import numpy as np
import pytest
import torch as th
from helpers import batch_of, new_loop, new_model, quick_half_convolutions

from guided_diffusion import logger
from guided_diffusion.errors import InputError
from guided_diffusion.fp16_util import MixedPrecisionTrainer

pytestmark = pytest.mark.usefixtures("quiet", "cpu")


def test_master_parameters_in_float32_are_the_model_parameters():
    model, _ = new_model()
    trainer = MixedPrecisionTrainer(model=model)
    assert all(a is b for a, b in zip(trainer.master_params, model.parameters(), strict=True))
    state_dict = trainer.master_params_to_state_dict(trainer.master_params)
    assert list(state_dict) == list(model.state_dict())
    for a, b in zip(trainer.state_dict_to_master_params(state_dict), model.parameters(), strict=True):
        assert (a == b).all()


@pytest.mark.parametrize("kind, dtype", [("use_fp16", th.float16), ("use_bf16", th.bfloat16)])
def test_half_precision_master_parameters_are_flat_and_saved_by_name(kind, dtype):
    model, _ = new_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = MixedPrecisionTrainer(model=model, **{kind: True})

    # Two flat master parameters, biases and norms before matrices, as in the optimiser files of the original.
    vectors = sum(v.numel() for v in before.values() if v.ndim <= 1)
    matrices = sum(v.numel() for v in before.values() if v.ndim > 1)
    assert [tuple(p.shape) for p in trainer.master_params] == [(vectors,), (1, matrices)]
    assert all(p.dtype == th.float32 for p in trainer.master_params)
    flat = th.cat([v.reshape(-1) for v in before.values() if v.ndim <= 1])
    assert (trainer.master_params[0] == flat).all()

    assert model.input_blocks[0][0].weight.dtype == dtype  # test_blocks.py checks the other layers

    # Checkpoints hold the float32 master parameters under the model's parameter names, without rounding.
    state_dict = trainer.master_params_to_state_dict(trainer.master_params)
    assert list(state_dict) == list(before)
    for name, value in state_dict.items():
        assert value.dtype == th.float32 and value.shape == before[name].shape
        assert (value == before[name]).all(), name
    for a, b in zip(trainer.state_dict_to_master_params(state_dict), trainer.master_params, strict=True):
        assert a.shape == b.shape and (a == b).all()


class Line(th.nn.Module):
    """A model y = w * x + b whose convert_to_fp16 and convert_to_bf16 do nothing."""

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


@pytest.mark.parametrize("kind, scale", [("use_fp16", 2**10), ("use_bf16", 1)])
def test_loss_scale_does_not_change_the_step(kind, scale):
    """float16 scales the loss; bfloat16 does not."""
    model = Line()
    trainer = MixedPrecisionTrainer(model=model, initial_lg_loss_scale=10.0, **{kind: True})
    opt = th.optim.SGD(trainer.master_params, lr=0.5)
    assert step_of(trainer, opt, 3.0) is True
    assert model.w.grad.item() == 3.0 * scale
    assert model.w.item() == 2.0 - 0.5 * 3.0
    assert model.b.item() == 1.0  # a parameter without a gradient does not change
    assert logger.getkvs()["grad_norm"] == pytest.approx(3.0)
    assert logger.getkvs()["param_norm"] == pytest.approx(5**0.5)
    assert logger.getkvs().get("lg_loss_scale") == (10.0 if kind == "use_fp16" else None)


def test_overflow_skips_the_step_and_lowers_the_scale():
    model = Line()
    trainer = MixedPrecisionTrainer(model=model, use_fp16=True, initial_lg_loss_scale=10.0, fp16_scale_growth=0.25)
    opt = th.optim.AdamW(trainer.master_params, lr=0.5)
    for bad in (float("inf"), float("nan")):
        before = trainer.lg_loss_scale
        assert step_of(trainer, opt, bad) is False
        assert trainer.lg_loss_scale == before - 1
        assert (model.w.item(), model.b.item()) == (2.0, 1.0)
        assert not opt.state  # the optimiser took no step
    # Every step with finite gradients adds fp16_scale_growth to the log2 of the loss scale.
    assert step_of(trainer, opt, 1.0) is True
    assert step_of(trainer, opt, 1.0) is True
    assert trainer.lg_loss_scale == 8.0 + 2 * 0.25
    assert model.w.item() < 2.0


@pytest.mark.parametrize("kind", ["use_fp16", "use_bf16"])
def test_small_updates_accumulate_in_the_master_parameters(kind):
    # Half precision rounds away an update of 1e-4 to a weight near 1; float32 master parameters keep the update.
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
    assert (used == th.tensor(0.999).to(used.dtype)).all()  # the network has the rounded master parameters


# Resuming in another precision


def trained(precision, folder, steps=3):
    """Train for `steps` steps, save a checkpoint in `folder`, and return the loop."""
    logger.configure(folder, format_strs=[])
    loop = new_loop(*new_model(), **precision)
    for step in range(steps):
        loop.run_step(batch_of(6, seed=step), {})
        loop.step += 1
    loop.save()
    return loop


def moments_by_name(loop):
    """Adam's moments by parameter name, for flat master parameters as well as for separate parameters."""
    state, named = loop.opt.state_dict()["state"], list(loop.model.named_parameters())
    if not loop.mp_trainer.flat:
        return {name: (state[i]["exp_avg"], state[i]["exp_avg_sq"]) for i, (name, _) in enumerate(named)}
    found = {}
    for i, wanted in enumerate((lambda p: p.ndim <= 1, lambda p: p.ndim > 1)):
        start = 0
        for name, p in named:
            if wanted(p):
                flat = [state[i][key].reshape(-1)[start : start + p.numel()] for key in ("exp_avg", "exp_avg_sq")]
                found[name] = tuple(v.view_as(p) for v in flat)
                start += p.numel()
    return found


@pytest.mark.parametrize("before, after", [("use_fp16", None), (None, "use_fp16"), ("use_bf16", None)])
def test_optimizer_state_survives_a_change_of_precision(before, after, tmp_path, monkeypatch):
    def precision(kind):
        return {kind: True, "initial_lg_loss_scale": 4.0} if kind else {}

    with quick_half_convolutions(monkeypatch):
        loop = trained(precision(before), str(tmp_path))
        path = str(tmp_path / "model000003.pt")
        resumed = new_loop(*new_model(), **precision(after), resume_checkpoint=path)
        want, got = moments_by_name(loop), moments_by_name(resumed)
        assert list(resumed.opt.state_dict()["state"]) == list(range(len(resumed.mp_trainer.master_params)))
        for name, p in resumed.model.named_parameters():
            assert all(th.equal(a, b) and a.any() for a, b in zip(want[name], got[name], strict=True)), name
            assert got[name][0].shape == p.shape and got[name][0].dtype == th.float32
        assert {float(s["step"]) for s in resumed.opt.state.values()} == {3}
        # Resuming in the first precision again restores the optimiser state exactly.
        logger.configure(str(tmp_path / "again"), format_strs=[])
        resumed.save()
        again = new_loop(*new_model(), **precision(before), resume_checkpoint=str(tmp_path / "again/model000003.pt"))
        for i, state in loop.opt.state_dict()["state"].items():
            assert all(th.equal(v, again.opt.state_dict()["state"][i][k]) for k, v in state.items())
        again.run_step(batch_of(6, seed=9), {})
        loop.run_step(batch_of(6, seed=9), {})


@pytest.mark.parametrize("kind", [None, "use_fp16"])
def test_optimizer_files_of_the_original_load(kind, tmp_path, monkeypatch):
    """Old PyTorch versions stored step counts as plain numbers and fewer options per parameter group."""
    model, diffusion = new_model()
    numel = [sum(p.numel() for p in model.parameters() if (p.ndim > 1) == matrix) for matrix in (False, True)]
    shapes = [(numel[0],), (1, numel[1])]
    moments = {i: {"exp_avg": th.randn(s), "exp_avg_sq": th.rand(s), "step": 500} for i, s in enumerate(shapes)}
    group = {"lr": 7.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.3, "amsgrad": False, "params": [0, 1]}
    th.save({"state": moments, "param_groups": [group]}, tmp_path / "opt000500.pt")
    th.save(model.state_dict(), tmp_path / "model000500.pt")
    options = {kind: True, "initial_lg_loss_scale": 4.0} if kind else {}
    with quick_half_convolutions(monkeypatch):
        loop = new_loop(model, diffusion, resume_checkpoint=str(tmp_path / "model000500.pt"), **options)
        got = moments_by_name(loop)
        start = [0, 0]
        for name, p in model.named_parameters():
            i, n = int(p.ndim > 1), p.numel()
            flat = moments[i]["exp_avg"].reshape(-1)[start[i] : start[i] + n]
            assert th.equal(got[name][0].reshape(-1), flat), name
            start[i] += n
        # The learning rate and weight decay come from the flags of the resumed run, not from the file.
        assert [(g["lr"], g["weight_decay"]) for g in loop.opt.param_groups] == [(1e-3, 0.0)]
        loop.run_step(batch_of(6), {})
        assert {float(s["step"]) for s in loop.opt.state.values()} == {501}


@pytest.mark.parametrize("count", [7, 7.0, th.tensor(7.0)])
def test_each_parameter_has_its_own_step_count_after_a_change_of_precision(count, tmp_path):
    loop = new_loop(*new_model(), use_bf16=True)
    loop.run_step(batch_of(6), {})
    state = loop.opt.state_dict()["state"]
    for moments in state.values():
        moments["step"] = count
    other = new_loop(*new_model())
    other.opt.load_state_dict({**other.opt.state_dict(), "state": other.mp_trainer.adapt_moments(state)})
    other.run_step(batch_of(6), {})
    steps = [moments["step"] for moments in other.opt.state.values()]
    assert len(steps) == len(other.mp_trainer.master_params) and all(float(step) == 8 for step in steps)
    assert len({step.data_ptr() for step in steps}) == len(steps)


def test_optimizer_state_of_another_network_is_refused(tmp_path):
    trained({}, str(tmp_path))
    state = th.load(tmp_path / "opt000003.pt")
    del state["state"][0]
    state["state"] = {i - 1: s for i, s in state["state"].items()}
    th.save(state, tmp_path / "opt000003.pt")
    with pytest.raises(InputError, match="opt000003.pt: the optimiser's state of another network"):
        new_loop(*new_model(), resume_checkpoint=str(tmp_path / "model000003.pt"))
    with pytest.raises(InputError, match="opt000003.pt"):
        new_loop(*new_model(), use_bf16=True, resume_checkpoint=str(tmp_path / "model000003.pt"))


def test_float16_training_matches_float32_training(monkeypatch):
    """Both runs use the same data, noise and timesteps. float16 skips the first steps: the loss scale is high."""

    def learn(**precision):
        th.manual_seed(0)
        np.random.seed(0)
        loop = new_loop(*new_model(), lr=3e-3, batch_size=8, seed=1, **precision)
        losses = []
        for step in range(75):
            loop.run_step(batch_of(8, seed=step % 4), {})
            loop.step += 1
            losses.append(logger.dumpkvs()["loss"])
        return loop, sum(losses[-20:]) / 20

    single, want = learn()
    with quick_half_convolutions(monkeypatch):
        half, got = learn(use_fp16=True, initial_lg_loss_scale=24.0)
    assert half.mp_trainer.lg_loss_scale < 24  # some steps overflowed
    assert want < 0.6 and abs(got - want) < 0.02 * want
