"""What the tests share: recorded data, weights from names, inputs from seeds, and quick half precision on CPUs."""

import gzip
import json
import math
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch as th
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).resolve().parent / "data"

# The tensors are small: a second thread costs more than it gains, above all where other work shares the cores.
th.set_num_threads(1)


def load_json(name):
    """A recorded fact file of tests/data, plain or gzipped."""
    path = DATA / name
    return json.loads(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_text())


def randn(seed, *shape):
    """Standard normal float32 numbers that depend on the seed and the shape only."""
    return th.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def fill_by_name(module):
    """Give every parameter values that follow from its name alone, and return the module in evaluation mode.

    So two implementations that agree on names and shapes compute the same function, whatever they draw at the start.
    Matrices have rows of norm about one, scales lie around one, and nothing is left at its initial zero.
    """
    values = {}
    for name, old in module.state_dict().items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        new = rng.standard_normal(tuple(old.shape)).astype(np.float32)
        if old.ndim > 1:
            new *= 1 / np.sqrt(math.prod(old.shape[1:]))
        elif name.endswith("weight"):
            new = 1 + 0.1 * new
        else:
            new *= 0.1
        values[name] = th.from_numpy(new).to(old.dtype)
    module.load_state_dict(values)
    return module.eval()


def relative_error(got, want):
    """The L2 norm of the difference over that of `want`, in float64."""
    got, want = (th.as_tensor(x).detach().double() for x in (got, want))
    return float((got - want).norm() / want.norm().clamp(min=1e-12))


def per_sample(t, like):
    """Reshape t [N] to broadcast over `like` [N, ...]."""
    return t.reshape(-1, *[1] * (like.ndim - 1))


@contextmanager
def quick_half_convolutions(monkeypatch):
    """Compute float16 convolutions in float32 and round the result: what the CPU kernel does, but many times faster.

    It insists that input, weight and bias have one dtype, as the kernels do.
    """

    def quick(convolve):
        def convolution(x, weight, bias=None, *args, **kwargs):
            if x.dtype != th.float16:
                return convolve(x, weight, bias, *args, **kwargs)
            assert weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype)
            bias = None if bias is None else bias.float()
            return convolve(x.float(), weight.float(), bias, *args, **kwargs).half()

        return convolution

    with monkeypatch.context() as patch:
        for name in ("conv1d", "conv2d"):
            patch.setattr(F, name, quick(getattr(F, name)))
        yield
