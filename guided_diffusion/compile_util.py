"""torch.compile: networks as kernels fused for one shape, made in a minute or more before the first call."""

import time

import torch as th

from . import logger
from .errors import InputError


class CompiledNetwork:
    """A network compiled for batches of one size; smaller ones are filled up, so that nothing is compiled again.

    The first call compiles, with the backward pass if it records one, and says how long that took.

    :param network: maps (x [N, ...], timesteps [N], keyword arguments [N, ...]) to [N, ...].
    :param batch_size: the largest N.
    """

    def __init__(self, network, batch_size):
        self.network = th.compile(network, fullgraph=True, dynamic=False)
        self.batch_size = batch_size
        self.compiled = False

    def __call__(self, x, timesteps, **kwargs):
        n = len(x)
        arguments = [self._fill(v) for v in (x, timesteps)]
        kwargs = {name: self._fill(v) for name, v in kwargs.items()}
        if not self.compiled:
            compiling(lambda: self._compile(*arguments, **kwargs))
            self.compiled = True
        return self.network(*arguments, **kwargs)[:n]

    def _compile(self, x, timesteps, **kwargs):
        y = self.network(x, timesteps, **kwargs)
        if y.requires_grad:  # the backward pass is compiled when it is first needed
            th.autograd.grad(y.sum(), x)

    def _fill(self, v):
        """v [n, ...] with its last entry repeated: [batch_size, ...], in one memory layout: others would recompile."""
        missing = self.batch_size - len(v)
        if missing < 0:
            raise ValueError(f"a batch of {len(v)} for a network compiled for {self.batch_size}")
        return (th.cat([v, v[-1:].expand(missing, *v.shape[1:])]) if missing else v).contiguous()


def compiling(work):
    """Call work(), in which torch compiles: say so and how long it took.

    :raises InputError: where this machine cannot compile.
    """
    from torch._dynamo.exc import TorchDynamoException  # only here: loading it takes a second

    logger.log("compiling (--compile True): this can take minutes...")
    start = time.time()
    try:
        result = work()
    except TorchDynamoException as e:
        cause = getattr(e, "inner_exception", e)  # older versions of torch wrap it
        reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise InputError(
            f"--compile True: torch cannot compile here: {reason}. It needs a C++ compiler (g++), and on a GPU Triton; "
            f"or leave --compile out"
        ) from None
    logger.log(f"compiled in {time.time() - start:.0f} s")
    return result
