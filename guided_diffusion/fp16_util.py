"""Training with a torso in half precision: loss scaling, and float32 master weights that the optimiser works on."""

import numpy as np
import torch as th
import torch.nn as nn

from . import logger

INITIAL_LOG_LOSS_SCALE = 20.0


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
    backward pass, and a step whose gradients overflowed is skipped and lowers the scale; bfloat16 needs no scale.

    :param fp16_scale_growth: how much a step without overflow adds to lg_loss_scale.
    """

    def __init__(
        self,
        *,
        model,
        use_fp16=False,
        fp16_scale_growth=1e-3,
        initial_lg_loss_scale=INITIAL_LOG_LOSS_SCALE,
        use_bf16=False,
    ):
        self.model = model
        self.use_fp16 = use_fp16
        self.use_bf16 = use_bf16
        self.fp16_scale_growth = fp16_scale_growth
        self.lg_loss_scale = initial_lg_loss_scale
        self.model_params = list(model.parameters())
        self.master_params = self.model_params
        self.param_groups_and_shapes = None
        if use_fp16 or use_bf16:
            self.param_groups_and_shapes = get_param_groups_and_shapes(model.named_parameters())
            self.master_params = self.state_dict_to_master_params(model.state_dict())
            model.convert_to_fp16() if use_fp16 else model.convert_to_bf16()

    def zero_grad(self):
        """Drop the gradients."""
        for p in self.model_params:
            p.grad = None

    def backward(self, loss: th.Tensor):
        """Add to the gradients those of a scalar loss."""
        (loss * 2**self.lg_loss_scale if self.use_fp16 else loss).backward()

    def optimize(self, opt: th.optim.Optimizer):
        """Take a step with the gradients at hand.

        :return: whether it was taken: False if a half-precision gradient had overflowed.
        """
        if self.param_groups_and_shapes is not None:
            return self._optimize_half(opt)
        logger.logkv_mean("grad_norm", _norm([p.grad for p in self.master_params if p.grad is not None]))
        logger.logkv_mean("param_norm", _norm(self.master_params))
        opt.step()
        return True

    def _optimize_half(self, opt):
        scale = 2**self.lg_loss_scale if self.use_fp16 else 1.0
        if self.use_fp16:
            logger.logkv_mean("lg_loss_scale", self.lg_loss_scale)
        for master, (group, shape) in zip(self.master_params, self.param_groups_and_shapes):
            grads = [th.zeros_like(p) if p.grad is None else p.grad for _, p in group]
            master.grad = _flatten([g.float() for g in grads]).view(shape)
        grad_norm = _norm([p.grad for p in self.master_params])
        took_step = np.isfinite(grad_norm)
        if took_step:
            logger.logkv_mean("grad_norm", grad_norm / scale)
            logger.logkv_mean("param_norm", _norm(self.master_params))
            for p in self.master_params:
                p.grad.mul_(1.0 / scale)
            opt.step()
            self._copy_masters_to_model()
            self.lg_loss_scale += self.fp16_scale_growth
        elif self.use_fp16:
            self.lg_loss_scale -= 1
            logger.log(f"overflow: skipped a step and lowered lg_loss_scale to {self.lg_loss_scale:.3f}")
        else:
            logger.log("a gradient is not finite: skipped a step")
        for p in self.master_params:
            p.grad = None
        return bool(took_step)

    @th.no_grad()
    def _copy_masters_to_model(self):
        for master, (group, _) in zip(self.master_params, self.param_groups_and_shapes):
            th._foreach_copy_([p for _, p in group], _unflatten(master, group))

    def master_params_to_state_dict(self, master_params):
        """A state_dict of the model, in float32, with the given master parameters (or averages of them)."""
        state_dict = self.model.state_dict()
        if self.param_groups_and_shapes is None:
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
        if self.param_groups_and_shapes is None:
            return [state_dict[name] for name, _ in self.model.named_parameters()]
        return [
            nn.Parameter(_flatten([state_dict[name].detach().float() for name, _ in group]).view(shape))
            for group, shape in self.param_groups_and_shapes
        ]


def _flatten(tensors):
    return th.cat([t.reshape(-1) for t in tensors])


def _unflatten(master, group):
    sizes = [p.numel() for _, p in group]
    return [piece.view_as(p) for piece, (_, p) in zip(master.reshape(-1).split(sizes), group)]


@th.no_grad()
def _norm(tensors):
    """The L2 norm of all elements together, as a float."""
    return float(th.linalg.vector_norm(th.stack(th._foreach_norm([t.detach() for t in tensors]))))
