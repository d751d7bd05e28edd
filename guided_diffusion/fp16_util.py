"""Mixed-precision training: half-precision convolutions, loss scaling, and float32 master weights for the optimizer."""

import math

import torch as th

from . import logger
from .nn import CONVOLUTIONS

INITIAL_LOG_LOSS_SCALE = 20.0
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state for each parameter, apart from the step count


def convert_module_to_f16(l):
    """Cast `l` to float16 if it is a convolution. Intended for Module.apply."""
    if isinstance(l, CONVOLUTIONS):
        l.half()


def convert_module_to_f32(l):
    """Cast `l` to float32 if it is a convolution. Intended for Module.apply, to undo convert_module_to_f16."""
    if isinstance(l, CONVOLUTIONS):
        l.float()


def get_param_groups_and_shapes(named_params):
    """Split parameters into two groups: scalars and vectors, and all others. Each group has one flat master parameter.

    :return: a list of two pairs (list of (name, parameter), shape of the flat master parameter).
    """
    named_params = list(named_params)
    vectors = [(n, p) for n, p in named_params if p.ndim <= 1]
    matrices = [(n, p) for n, p in named_params if p.ndim > 1]
    return [(vectors, (-1,)), (matrices, (1, -1))]


class MixedPrecisionTrainer:
    """Holds the master parameters and takes optimizer steps, in float32 or with half-precision convolutions.

    In float32 the master parameters are the model's own parameters. With use_fp16 or use_bf16 the master parameters are
    two flat float32 tensors, as in the original's optimizer files: one holds the model's vectors, the other its
    matrices. The model's convolutions are cast to half precision, and each step copies the master parameters to the
    model.

    In float16 the loss is multiplied by 2**lg_loss_scale before the backward pass. A step whose gradients overflow is
    skipped, and lowers the loss scale. bfloat16 needs no loss scale. In every precision, a step with a non-finite loss
    or gradient is skipped.

    :param fp16_scale_growth: the increase of lg_loss_scale after each step without overflow.
    :param max_grad_norm: clip gradients to this L2 norm; 0 disables clipping.
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
        self.flat = use_fp16 or use_bf16  # whether the master parameters are two flat tensors
        if self.flat:
            self.master_params = self.state_dict_to_master_params(model.state_dict())
            model.convert_to_fp16() if use_fp16 else model.convert_to_bf16()

    def zero_grad(self):
        """Set the gradients of model and master parameters to None."""
        for p in [*self.model_params, *self.master_params]:
            p.grad = None

    @property
    def _loss_scale(self):
        return 2**self.lg_loss_scale if self.use_fp16 else 1.0

    def backward(self, loss: th.Tensor):
        """Accumulate the gradients of a scalar loss. A non-finite loss makes all gradients NaN.

        Averaging over ranks spreads NaN gradients, so that all ranks skip the same step without extra communication.
        """
        (loss * th.where(loss.isfinite(), self._loss_scale, math.nan)).backward()

    def optimize(self, opt: th.optim.Optimizer):
        """Take an optimizer step with the accumulated gradients.

        :return: True if the step was taken, False if it was skipped because a gradient is not finite.
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
        """Concatenate tensors, given by parameter name, into one flat float32 tensor per parameter group."""
        return [
            th.cat([named[name].detach().float().reshape(-1) for name, _ in group]).view(shape)
            for group, shape in self.param_groups_and_shapes
        ]

    def _unflatten(self, flat):
        """Split flat tensors into a dict of views by parameter name. The inverse of _flatten."""
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
        """Return a float32 state_dict of the model with the values of master parameters or of their moving averages."""
        state_dict = self.model.state_dict()
        if self.flat:
            state_dict.update(self._unflatten(master_params))
        else:
            state_dict.update((name, p.detach()) for (name, _), p in zip(self.model.named_parameters(), master_params))
        return state_dict

    def state_dict_to_master_params(self, state_dict):
        """Return master parameters with the values of a state_dict. The inverse of master_params_to_state_dict."""
        if self.flat:
            return [th.nn.Parameter(v) for v in self._flatten(state_dict)]
        return [state_dict[name] for name, _ in self.model.named_parameters()]

    def adapt_moments(self, moments):
        """Convert Adam's moments, saved by a run in another precision, to the layout of these master parameters.

        :param moments: the entry "state" of an optimizer's state_dict: {parameter index: {"exp_avg": tensor, ...}}.
        :return: the converted moments in the same format, or None if the moments belong to another network.
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
    """Return the L2 norm of all elements of all tensors, as a float."""
    return float(th.nn.utils.get_total_norm([t.detach() for t in tensors]))
