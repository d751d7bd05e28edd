"""Training with a torso in half precision: loss scaling, and float32 master weights for the optimizer."""

import math

import torch as th

from . import logger
from .nn import CONVOLUTIONS

INITIAL_LOG_LOSS_SCALE = 20.0
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of a parameter, beside its number of steps


def convert_module_to_f16(l):
    """Cast a convolution to float16. For Module.apply: other modules are left as they are."""
    if isinstance(l, CONVOLUTIONS):
        l.half()


def convert_module_to_f32(l):
    """Cast a convolution to float32, undoing convert_module_to_f16."""
    if isinstance(l, CONVOLUTIONS):
        l.float()


def get_param_groups_and_shapes(named_params):
    """Divide parameters into scalars and vectors, and the rest. Each group becomes one flat master parameter.

    :return: a list of (list of (name, parameter), flat shape).
    """
    named_params = list(named_params)
    vectors = [(n, p) for n, p in named_params if p.ndim <= 1]
    matrices = [(n, p) for n, p in named_params if p.ndim > 1]
    return [(vectors, (-1,)), (matrices, (1, -1))]


class MixedPrecisionTrainer:
    """Holds the master parameters and takes the optimizer's steps, in float32 or with a torso in half precision.

    In float32 the master parameters are the model's own. With use_fp16 or use_bf16 they are two flat float32 tensors,
    as in the original's optimizer files: one of the model's vectors, one of its matrices. The model's convolutions are
    converted, and the model gets the masters' values after each step. In float16 the loss is multiplied by
    2**lg_loss_scale before the backward pass; gradients that overflow skip the step and lower the scale. bfloat16 needs
    no scale. In any precision, a step whose loss or gradient is not finite is skipped.

    :param fp16_scale_growth: the increase of lg_loss_scale in a step without overflow.
    :param max_grad_norm: scale larger gradients down to this L2 norm; 0 disables it.
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
        """Whether the masters are two flat tensors instead of the model's own parameters."""
        return self.param_groups_and_shapes is not None

    def zero_grad(self):
        """Remove the gradients."""
        self.model.zero_grad()

    @property
    def _loss_scale(self):
        return 2**self.lg_loss_scale if self.use_fp16 else 1.0

    def backward(self, loss: th.Tensor):
        """Add the gradients of a scalar loss to the parameters' gradients. A loss that is not finite makes them NaN.

        After averaging over the ranks, every rank then sees that one rank's loss was bad, without extra communication.
        """
        (loss * th.where(loss.isfinite(), self._loss_scale, math.nan)).backward()

    def optimize(self, opt: th.optim.Optimizer):
        """Take a step with the parameters' gradients.

        :return: whether it was taken: False if a gradient is not finite.
        """
        if self.use_fp16:
            logger.logkv_mean("lg_loss_scale", self.lg_loss_scale)
        grads = self._master_gradients()
        grad_norm = _norm(grads) / self._loss_scale
        took_step = math.isfinite(grad_norm)
        if took_step:
            logger.logkv_mean("grad_norm", grad_norm)
            logger.logkv_mean("param_norm", _norm(self.master_params))
            factor = 1.0 / self._loss_scale
            if 0 < self.max_grad_norm < grad_norm:
                factor *= self.max_grad_norm / grad_norm
            if factor != 1:
                for grad in grads:
                    grad.mul_(factor)
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
            opt.zero_grad()
        return took_step

    def _master_gradients(self):
        """The gradients of the master parameters that have one."""
        if self.flat:
            for master, (group, shape) in zip(self.master_params, self.param_groups_and_shapes):
                grads = [th.zeros_like(p) if p.grad is None else p.grad for _, p in group]
                master.grad = _flatten([g.float() for g in grads]).view(shape)
        return [p.grad for p in self.master_params if p.grad is not None]

    def not_finite(self):
        """The names of the model's parameters whose gradient from the last backward pass is not finite."""
        named = ((name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None)
        return [name for name, grad in named if not grad.isfinite().all()]

    def _named(self, master_params):
        """The master parameters (or averages of them) by the names of the model's parameters."""
        if not self.flat:
            return {name: value.detach() for (name, _), value in zip(self.model.named_parameters(), master_params)}
        return {
            name: value.detach()
            for master, (group, _) in zip(master_params, self.param_groups_and_shapes)
            for (name, _), value in zip(group, _unflatten(master, group))
        }

    @th.no_grad()
    def _copy_masters_to_model(self):
        masters = self._named(self.master_params)
        for name, p in self.model.named_parameters():
            p.copy_(masters[name])

    def master_params_to_state_dict(self, master_params):
        """A state_dict of the model, in float32, with the given master parameters (or averages of them)."""
        state_dict = self.model.state_dict()
        state_dict.update(self._named(master_params))
        return state_dict

    def state_dict_to_master_params(self, state_dict):
        """The inverse of master_params_to_state_dict: new master parameters with the values of a state_dict."""
        if not self.flat:
            return [state_dict[name] for name, _ in self.model.named_parameters()]
        return [
            th.nn.Parameter(_flatten([state_dict[name].detach().float() for name, _ in group]).view(shape))
            for group, shape in self.param_groups_and_shapes
        ]

    def adapt_moments(self, moments):
        """Convert Adam's moments that a run in another precision saved to the layout of these master parameters.

        :param moments: the "state" of an optimizer's state_dict: {index of the parameter: {"exp_avg": tensor, ...}}.
        :return: the same for these masters. Moments that have their layout already are returned as they are.
        """
        if not moments or self.flat == self._are_flat(moments):
            return moments
        number = {name: i for i, (name, _) in enumerate(self.model.named_parameters())}
        groups = get_param_groups_and_shapes(self.model.named_parameters())
        adapted = {}
        for i, (group, shape) in enumerate(groups):
            if self.flat:
                members = [moments.get(number[name]) for name, _ in group]
                adapted[i] = {"step": max((float(m["step"]) for m in members if m is not None), default=0.0)}
                for key in MOMENTS:
                    pieces = [p.new_zeros(p.shape) if m is None else m[key] for m, (_, p) in zip(members, group)]
                    adapted[i][key] = _flatten(pieces).float().view(shape)
            else:
                pieces = zip(group, *(_unflatten(moments[i][key], group) for key in MOMENTS))
                for (name, _), *values in pieces:
                    adapted[number[name]] = {**dict(zip(MOMENTS, values)), "step": float(moments[i]["step"])}
        return dict(sorted(adapted.items()))

    def _are_flat(self, moments):
        own = [p.shape for p in self.model_params]
        return any(i >= len(own) or m["exp_avg"].shape != own[i] for i, m in moments.items())


def _flatten(tensors):
    return th.cat([t.reshape(-1) for t in tensors])


def _unflatten(master, group):
    sizes = [p.numel() for _, p in group]
    return [piece.view_as(p) for piece, (_, p) in zip(master.reshape(-1).split(sizes), group)]


@th.no_grad()
def _norm(tensors):
    """The L2 norm of all elements of all tensors, as a float."""
    return float(th.nn.utils.get_total_norm([t.detach() for t in tensors]))
