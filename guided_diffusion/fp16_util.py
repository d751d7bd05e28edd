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
        self, *, model, use_fp16=False, fp16_scale_growth=1e-3, initial_lg_loss_scale=INITIAL_LOG_LOSS_SCALE,
        use_bf16=False, max_grad_norm=0.0,
    ):  # fmt: skip
        self.model = model
        self.use_fp16 = use_fp16
        self.fp16_scale_growth = fp16_scale_growth
        self.lg_loss_scale = initial_lg_loss_scale
        self.max_grad_norm = max_grad_norm
        self.model_params = list(model.parameters())
        self.master_params = self.model_params
        self.param_groups_and_shapes = get_param_groups_and_shapes(model.named_parameters())
        self.flat = use_fp16 or use_bf16  # whether the masters are two flat tensors, not the model's own parameters
        if self.flat:
            self.master_params = self.state_dict_to_master_params(model.state_dict())
            model.convert_to_fp16() if use_fp16 else model.convert_to_bf16()

    def zero_grad(self):
        """Remove the gradients."""
        for p in [*self.model_params, *self.master_params]:
            p.grad = None

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
        if self.flat:
            named = self.model.named_parameters()
            grads = self._flatten({name: th.zeros_like(p) if p.grad is None else p.grad for name, p in named})
            for master, grad in zip(self.master_params, grads):
                master.grad = grad
        grads = [p.grad for p in self.master_params if p.grad is not None]
        grad_norm = _norm(grads) / self._loss_scale
        if not math.isfinite(grad_norm):
            logger.log("skipped a step: the loss or a gradient is not finite")
            if self.use_fp16:
                self.lg_loss_scale -= 1
                logger.log(f"lowered lg_loss_scale to {self.lg_loss_scale:.3f}")
            return False
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
        if self.use_fp16:
            self.lg_loss_scale += self.fp16_scale_growth
        return True

    def _flatten(self, named):
        """Convert tensors by the names of the model's parameters to two flat ones in float32."""
        return [
            th.cat([named[name].detach().float().reshape(-1) for name, _ in group]).view(shape)
            for group, shape in self.param_groups_and_shapes
        ]

    def _unflatten(self, flat):
        """Undo _flatten: return a dict of views."""
        named = {}
        for tensor, (group, _) in zip(flat, self.param_groups_and_shapes):
            pieces = tensor.detach().view(-1).split([p.numel() for _, p in group])
            named.update({name: piece.view_as(p) for piece, (name, p) in zip(pieces, group)})
        return named

    @th.no_grad()
    def _copy_masters_to_model(self):
        masters = self._unflatten(self.master_params)
        for name, p in self.model.named_parameters():
            p.copy_(masters[name])

    def master_params_to_state_dict(self, master_params):
        """A state_dict of the model, in float32, with the given master parameters (or averages of them)."""
        state_dict = self.model.state_dict()
        if self.flat:
            state_dict.update(self._unflatten(master_params))
        else:
            state_dict.update((name, p.detach()) for (name, _), p in zip(self.model.named_parameters(), master_params))
        return state_dict

    def state_dict_to_master_params(self, state_dict):
        """The inverse of master_params_to_state_dict: new master parameters with the values of a state_dict."""
        if self.flat:
            return [th.nn.Parameter(v) for v in self._flatten(state_dict)]
        return [state_dict[name] for name, _ in self.model.named_parameters()]

    def adapt_moments(self, moments):
        """Convert Adam's moments that a run in another precision saved to the layout of these master parameters.

        :param moments: the "state" of an optimizer's state_dict: {index of the parameter: {"exp_avg": tensor, ...}}.
        :return: the same for these masters, or None if the moments belong to another network.
        """
        sizes = {i: m["exp_avg"].shape for i, m in moments.items()}
        own = dict(enumerate(p.shape for p in self.master_params))
        if sizes.items() <= own.items():
            return moments
        if sum(map(math.prod, sizes.values())) != sum(map(math.prod, own.values())):
            return None
        names = [name for name, _ in self.model.named_parameters()]
        step = max(float(m["step"]) for m in moments.values())
        adapted = {i: {"step": step} for i in own}
        for key in MOMENTS:
            values = [moments[i][key] for i in sorted(moments)]
            if self.flat:
                values = self._flatten(dict(zip(names, values)))
            else:
                by_name = self._unflatten(values)
                values = [by_name[name] for name in names]
            for i, value in enumerate(values):
                adapted[i][key] = value
        return adapted


@th.no_grad()
def _norm(tensors):
    """The L2 norm of all elements of all tensors, as a float."""
    return float(th.nn.utils.get_total_norm([t.detach() for t in tensors]))
