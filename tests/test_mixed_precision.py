"""Training in half precision: float32 masters, the loss scale, and steps that are skipped."""

import pytest
import torch as th
from helpers import batch_of, copies, new_loop, new_model

from guided_diffusion import logger
from guided_diffusion.fp16_util import MixedPrecisionTrainer

pytestmark = pytest.mark.usefixtures("quiet", "cpu")


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
