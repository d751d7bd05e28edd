"""Training with a torso in half precision: loss scaling, and float32 master weights that the optimiser works on."""

import inspect
import math

import numpy as np
import torch as th
import torch.nn as nn
from torch.optim import AdamW

from . import logger
from .nn import copy_tensors

INITIAL_LOG_LOSS_SCALE = 20.0
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter, beside its count of steps


class LeanAdamW(AdamW):
    """AdamW without the decorators by which making it and its first step load torch's compiler: 60 MB, and a second."""

    add_param_group = inspect.unwrap(AdamW.add_param_group)
    step = th.no_grad()(inspect.unwrap(AdamW.step))


def convert_module_to_f16(l):
    """Cast a convolution to float16. For use with Module.apply: other modules stay as they are."""
    if isinstance(l, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        l.half()


def convert_module_to_f32(l):
    """Cast a convolution to float32, undoing convert_module_to_f16."""
    if isinstance(l, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        l.float()


def get_param_groups_and_shapes(named_params):
    """Part parameters into scalars-and-vectors and the rest; each group becomes one flat master parameter.

    :return: a list of (list of (name, parameter), flat shape).
    """
    named_params = list(named_params)
    vectors = [(n, p) for n, p in named_params if p.ndim <= 1]
    matrices = [(n, p) for n, p in named_params if p.ndim > 1]
    return [(vectors, (-1,)), (matrices, (1, -1))]


class MixedPrecisionTrainer:
    """Holds what the optimiser works on and takes its steps, in float32 or with a torso in half precision.

    In float32 the master parameters are the model's own. With use_fp16 or use_bf16 they are two flat float32 tensors,
    as in the original's optimiser files: of the model's vectors and of its matrices; the model's convolutions are
    converted and get the masters' values after each step. In float16 the loss is scaled by 2**lg_loss_scale before the
    backward pass, and a step whose gradients overflowed is skipped and lowers the scale; bfloat16 needs no scale. In
    any precision a step whose loss or gradient is not finite is skipped.

    :param fp16_scale_growth: how much a step without overflow adds to lg_loss_scale.
    :param max_grad_norm: shrink longer gradients to this L2 norm; 0 leaves all as they are.
    """

    def __init__(
        self,
        *,
        model,
        use_fp16=False,
        fp16_scale_growth=1e-3,
        initial_lg_loss_scale=INITIAL_LOG_LOSS_SCALE,
        use_bf16=False,
        max_grad_norm=0.0,
    ):
        self.model = model
        self.use_fp16 = use_fp16
        self.use_bf16 = use_bf16
        self.fp16_scale_growth = fp16_scale_growth
        self.lg_loss_scale = initial_lg_loss_scale
        self.max_grad_norm = max_grad_norm
        self.model_params = list(model.parameters())
        self.master_params = self.model_params
        self.param_groups_and_shapes = None
        if use_fp16 or use_bf16:
            self.param_groups_and_shapes = get_param_groups_and_shapes(model.named_parameters())
            self.master_params = self.state_dict_to_master_params(model.state_dict())
            model.convert_to_fp16() if use_fp16 else model.convert_to_bf16()

    @property
    def flat(self):
        """Whether the masters are two flat tensors, rather than the model's own parameters."""
        return self.param_groups_and_shapes is not None

    def zero_grad(self):
        """Drop the gradients."""
        for p in self.model_params:
            p.grad = None

    @property
    def _loss_scale(self):
        return 2**self.lg_loss_scale if self.use_fp16 else 1.0

    def backward(self, loss: th.Tensor):
        """Add to the gradients those of a scalar loss; all of them NaN if it is not finite.

        So the ranks' common gradient shows to every rank that one rank's loss is bad, without a word more between them.
        """
        (loss * th.where(loss.isfinite(), self._loss_scale, math.nan)).backward()

    def optimize(self, opt: th.optim.Optimizer):
        """Take a step with the gradients at hand.

        :return: whether it was taken: False if a gradient is not finite.
        """
        if self.use_fp16:
            logger.logkv_mean("lg_loss_scale", self.lg_loss_scale)
        grads = self._master_gradients()
        grad_norm = _norm(grads) / self._loss_scale
        took_step = bool(np.isfinite(grad_norm))
        if took_step:
            logger.logkv_mean("grad_norm", grad_norm)
            logger.logkv_mean("param_norm", _norm(self.master_params))
            factor = 1.0 / self._loss_scale
            if 0 < self.max_grad_norm < grad_norm:
                factor *= self.max_grad_norm / grad_norm
            if factor != 1:
                th._foreach_mul_(grads, factor)
            opt.step()
            if self.flat:
                self._copy_masters_to_model()
            self.lg_loss_scale += self.fp16_scale_growth if self.use_fp16 else 0
        elif self.use_fp16:
            self.lg_loss_scale -= 1
            logger.log(f"overflow: skipped a step and lowered lg_loss_scale to {self.lg_loss_scale:.3f}")
        else:
            logger.log("the loss or a gradient is not finite: skipped a step")
        if self.flat:
            for p in self.master_params:
                p.grad = None
        return took_step

    def _master_gradients(self):
        """The gradients of the master parameters that have one."""
        if self.flat:
            for master, (group, shape) in zip(self.master_params, self.param_groups_and_shapes):
                grads = [th.zeros_like(p) if p.grad is None else p.grad for _, p in group]
                master.grad = _flatten([g.float() for g in grads]).view(shape)
        return [p.grad for p in self.master_params if p.grad is not None]

    def not_finite(self):
        """The names of the model's parameters whose gradient, of the last backward pass, is not finite."""
        named = ((name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None)
        return [name for name, grad in named if not grad.isfinite().all()]

    def _copy_masters_to_model(self):
        for master, (group, _) in zip(self.master_params, self.param_groups_and_shapes):
            copy_tensors([p for _, p in group], _unflatten(master, group))

    def master_params_to_state_dict(self, master_params):
        """A state_dict of the model, in float32, with the given master parameters (or averages of them)."""
        state_dict = self.model.state_dict()
        if not self.flat:
            named = zip((name for name, _ in self.model.named_parameters()), master_params)
        else:
            named = (
                (name, value)
                for master, (group, _) in zip(master_params, self.param_groups_and_shapes)
                for (name, _), value in zip(group, _unflatten(master, group))
            )
        state_dict.update((name, value.detach()) for name, value in named)
        return state_dict

    def state_dict_to_master_params(self, state_dict):
        """The inverse of master_params_to_state_dict: new master parameters with the values of a state_dict."""
        if not self.flat:
            return [state_dict[name] for name, _ in self.model.named_parameters()]
        return [
            nn.Parameter(_flatten([state_dict[name].detach().float() for name, _ in group]).view(shape))
            for group, shape in self.param_groups_and_shapes
        ]

    def adapt_moments(self, moments):
        """Bring Adam's moments, as a run in another precision saved them, into the form of these master parameters.

        :param moments: the "state" of an optimiser's state_dict: {number of the parameter: {"exp_avg": tensor, ...}}.
        :return: the same for these masters; what already has their form, or none at all, is returned as it is.
        """
        if not moments or self.flat == self._are_flat(moments):
            return moments
        number = {name: i for i, (name, _) in enumerate(self.model.named_parameters())}
        groups = get_param_groups_and_shapes(self.model.named_parameters())
        adapted = {}
        for i, (group, shape) in enumerate(groups):
            if self.flat:
                members = [moments.get(number[name]) for name, _ in group]
                adapted[i] = {
                    key: _flatten([p.new_zeros(p.shape) if m is None else m[key] for m, (_, p) in zip(members, group)])
                    .float()
                    .view(shape)
                    for key in MOMENTS
                }
                adapted[i]["step"] = max((float(m["step"]) for m in members if m is not None), default=0.0)
            else:
                pieces = zip(group, *(_unflatten(moments[i][key], group) for key in MOMENTS))
                for (name, _), *values in pieces:
                    adapted[number[name]] = {**dict(zip(MOMENTS, values)), "step": float(moments[i]["step"])}
        return dict(sorted(adapted.items()))

    def _are_flat(self, moments):
        shapes = {i: tuple(m["exp_avg"].shape) for i, m in moments.items()}
        own = [tuple(p.shape) for p in self.model_params]
        return not all(i < len(own) and shape == own[i] for i, shape in shapes.items())


def _flatten(tensors):
    return th.cat([t.reshape(-1) for t in tensors])


def _unflatten(master, group):
    sizes = [p.numel() for _, p in group]
    return [piece.view_as(p) for piece, (_, p) in zip(master.reshape(-1).split(sizes), group)]


@th.no_grad()
def _norm(tensors):
    """The L2 norm of all elements together, as a float."""
    return float(th.linalg.vector_norm(th.stack(th._foreach_norm([t.detach() for t in tensors]))))
