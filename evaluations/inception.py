"""The 2015 Inception network that defines FID, in PyTorch, with the weights of the frozen TensorFlow graph.

The tensorboard package can parse the graph's file format, so TensorFlow itself is not needed.
"""

import os
from pathlib import Path

import numpy as np
import torch as th
import torch.nn.functional as F

from guided_diffusion.downloads import download_file
from guided_diffusion.errors import InputError

from .output import say

FILE_NAME = "classify_image_graph_def.pb"
ADDRESS = f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/{FILE_NAME}"
POOL_DIM, SPATIAL_CHANNELS, SPATIAL_SIZE, NUM_CLASSES, INPUT_SIZE = 2048, 7, 17, 1008, 299
SPATIAL_DIM = SPATIAL_SIZE**2 * SPATIAL_CHANNELS
BATCH_NORM_EPSILON = 1e-3


def _mixed(name, channels, branches):
    """Prefix the layer names of a block. Layers are (name, in, out, kernel, stride), where in=None means `channels`."""
    return [(f"{name}/{layer}", channels if cin is None else cin, *rest) for layer, cin, *rest in branches]


def _layers():
    """List all convolutions as (name, channels in, channels out, kernel, stride). Stride 2 implies no padding."""
    layers = [
        ("conv", 3, 32, (3, 3), 2), ("conv_1", 32, 32, (3, 3), 1), ("conv_2", 32, 64, (3, 3), 1),
        ("conv_3", 64, 80, (1, 1), 1), ("conv_4", 80, 192, (3, 3), 1),
    ]  # fmt: skip
    for name, channels, pooled in (("mixed", 192, 32), ("mixed_1", 256, 64), ("mixed_2", 288, 64)):
        layers += _mixed(name, channels, [
            ("conv", None, 64, (1, 1), 1),
            ("tower/conv", None, 48, (1, 1), 1), ("tower/conv_1", 48, 64, (5, 5), 1),
            ("tower_1/conv", None, 64, (1, 1), 1), ("tower_1/conv_1", 64, 96, (3, 3), 1),
            ("tower_1/conv_2", 96, 96, (3, 3), 1),
            ("tower_2/conv", None, pooled, (1, 1), 1),
        ])  # fmt: skip
    layers += _mixed("mixed_3", 288, [
        ("conv", None, 384, (3, 3), 2),
        ("tower/conv", None, 64, (1, 1), 1), ("tower/conv_1", 64, 96, (3, 3), 1), ("tower/conv_2", 96, 96, (3, 3), 2),
    ])  # fmt: skip
    for name, c in (("mixed_4", 128), ("mixed_5", 160), ("mixed_6", 160), ("mixed_7", 192)):
        layers += _mixed(name, 768, [
            ("conv", None, 192, (1, 1), 1),
            ("tower/conv", None, c, (1, 1), 1), ("tower/conv_1", c, c, (1, 7), 1), ("tower/conv_2", c, 192, (7, 1), 1),
            ("tower_1/conv", None, c, (1, 1), 1), ("tower_1/conv_1", c, c, (7, 1), 1),
            ("tower_1/conv_2", c, c, (1, 7), 1), ("tower_1/conv_3", c, c, (7, 1), 1),
            ("tower_1/conv_4", c, 192, (1, 7), 1),
            ("tower_2/conv", None, 192, (1, 1), 1),
        ])  # fmt: skip
    layers += _mixed("mixed_8", 768, [
        ("tower/conv", None, 192, (1, 1), 1), ("tower/conv_1", 192, 320, (3, 3), 2),
        ("tower_1/conv", None, 192, (1, 1), 1), ("tower_1/conv_1", 192, 192, (1, 7), 1),
        ("tower_1/conv_2", 192, 192, (7, 1), 1), ("tower_1/conv_3", 192, 192, (3, 3), 2),
    ])  # fmt: skip
    for name, channels in (("mixed_9", 1280), ("mixed_10", 2048)):
        layers += _mixed(name, channels, [
            ("conv", None, 320, (1, 1), 1),
            ("tower/conv", None, 384, (1, 1), 1),
            ("tower/mixed/conv", 384, 384, (1, 3), 1), ("tower/mixed/conv_1", 384, 384, (3, 1), 1),
            ("tower_1/conv", None, 448, (1, 1), 1), ("tower_1/conv_1", 448, 384, (3, 3), 1),
            ("tower_1/mixed/conv", 384, 384, (1, 3), 1), ("tower_1/mixed/conv_1", 384, 384, (3, 1), 1),
            ("tower_2/conv", None, 192, (1, 1), 1),
        ])  # fmt: skip
    return layers


LAYERS = _layers()
UNPADDED = {"conv", "conv_1", "conv_3", "conv_4"}  # all layers with stride 2 are unpadded, too


class InceptionV3(th.nn.Module):
    """Computes pool and spatial features of images.

    :param constants: the graph's constants: {node name: float32 array}.
    :param dtype: the dtype of the convolutions.
    """

    pool_dim, spatial_dim = POOL_DIM, SPATIAL_DIM

    def __init__(self, constants, dtype=th.float32):
        super().__init__()
        self.dtype = dtype
        self.convolutions = {}
        for name, cin, cout, kernel, stride in LAYERS:
            weight, bias = _folded(constants, name)
            padding = (0, 0) if stride == 2 or name in UNPADDED else (kernel[0] // 2, kernel[1] // 2)
            key = name.replace("/", "_")
            self.register_buffer(f"{key}_weight", weight.to(dtype, memory_format=th.channels_last))
            self.register_buffer(f"{key}_bias", bias.to(dtype))
            self.convolutions[name] = (key, stride, padding)
        self.register_buffer("softmax_weights", th.from_numpy(constants["softmax/weights"].astype(np.float64)))

    @property
    def device(self):
        return self.softmax_weights.device

    @th.inference_mode()
    def forward(self, images):
        """Return float32 pool features [N, 2048] and spatial features [N, 2023] of uint8 images [N, H, W, 3]."""
        with th.backends.cudnn.flags(None, None, None, None, allow_tf32=False):  # TF32 would change the features
            return self._features(images)

    def _features(self, images):
        x = legacy_resize(images.permute(0, 3, 1, 2).float(), INPUT_SIZE)
        x = x.sub_(128).mul_(1 / 128).to(self.dtype).contiguous(memory_format=th.channels_last)
        for name in ("conv", "conv_1", "conv_2"):
            x = self._conv(name, x)
        x = self._conv("conv_4", self._conv("conv_3", F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name in ("mixed", "mixed_1", "mixed_2"):
            x = th.cat([
                self._conv(f"{name}/conv", x),
                self._chain(f"{name}/tower", x, 2),
                self._chain(f"{name}/tower_1", x, 3),
                self._conv(f"{name}/tower_2/conv", _average(x)),
            ], dim=1)  # fmt: skip
        x = th.cat([self._conv("mixed_3/conv", x), self._chain("mixed_3/tower", x, 3), F.max_pool2d(x, 3, 2)], dim=1)
        for name in ("mixed_4", "mixed_5", "mixed_6", "mixed_7"):
            first = self._conv(f"{name}/conv", x)
            if name == "mixed_6":
                spatial = first[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).reshape(len(x), -1).float()
            x = th.cat([
                first,
                self._chain(f"{name}/tower", x, 3),
                self._chain(f"{name}/tower_1", x, 5),
                self._conv(f"{name}/tower_2/conv", _average(x)),
            ], dim=1)  # fmt: skip
        x = th.cat([self._chain("mixed_8/tower", x, 2), self._chain("mixed_8/tower_1", x, 4), F.max_pool2d(x, 3, 2)], 1)
        x = self._widest("mixed_9", x, _average(x))
        x = self._widest("mixed_10", x, F.max_pool2d(x, 3, 1, padding=1))
        return x.float().mean(dim=(2, 3)), spatial

    @th.inference_mode()
    def logits(self, pool):
        """Return the logits for the Inception Score, float64 [N, 1008]. As in the original, the bias is left out."""
        return pool.double() @ self.softmax_weights

    def _conv(self, name, x):
        key, stride, padding = self.convolutions[name]
        weight, bias = (getattr(self, f"{key}_{kind}") for kind in ("weight", "bias"))
        return F.relu_(_convolve(x, weight, bias, stride, padding))

    def _chain(self, scope, x, count):
        """Apply the first `count` convolutions (conv, conv_1, ...) of a scope in sequence."""
        for i in range(count):
            x = self._conv(f"{scope}/conv_{i}" if i else f"{scope}/conv", x)
        return x

    def _widest(self, name, x, pooled):
        """Apply one of the last two blocks. Each of their towers ends in two parallel convolutions."""
        tower, tower_1 = self._conv(f"{name}/tower/conv", x), self._chain(f"{name}/tower_1", x, 2)
        forks = [
            self._conv(f"{name}/{scope}/mixed/{conv}", y)
            for scope, y in (("tower", tower), ("tower_1", tower_1))
            for conv in ("conv", "conv_1")
        ]
        return th.cat([self._conv(f"{name}/conv", x), *forks, self._conv(f"{name}/tower_2/conv", pooled)], dim=1)


def _convolve(x, weight, bias, stride, padding):
    """Apply F.conv2d; float32 on CPUs always uses oneDNN.

    With one thread and fewer than 16 images, PyTorch uses another implementation for 1x1 kernels, which rounds
    differently. The features would then depend on the number of threads and on the batch size.
    """
    if x.device.type == "cpu" and x.dtype == th.float32 and th.backends.mkldnn.is_available():
        return th.mkldnn_convolution(x, weight, bias, padding, (stride, stride), (1, 1), 1)
    return F.conv2d(x, weight, bias, stride, padding)


def _average(x):
    return F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False)


def _folded(constants, name):
    """Fold a batch norm with scale 1 into its convolution in float64. Returns weight [out, in, h, w] and bias [out]."""
    weight = constants[f"{name}/conv2d_params"].astype(np.float64).transpose(3, 2, 0, 1)
    beta, mean, variance = (
        constants[f"{name}/batchnorm/{part}"].astype(np.float64) for part in ("beta", "moving_mean", "moving_variance")
    )
    scale = 1 / np.sqrt(variance + BATCH_NORM_EPSILON)
    return th.from_numpy((weight * scale[:, None, None, None])).float(), th.from_numpy(beta - mean * scale).float()


def legacy_resize(x, size):
    """Resize [N, C, H, W] to [N, C, size, size] as TensorFlow 1 did: bilinearly, with aligned top left corners."""

    def neighbours(length):
        position = np.arange(size, dtype=np.float32) * np.float32(length / size)
        lower = np.floor(position).astype(np.int64)
        upper = np.minimum(lower + 1, length - 1)
        return (th.from_numpy(a).to(x.device) for a in (lower, upper, position - lower.astype(np.float32)))

    def between(x, dim):
        lower, upper, share = neighbours(x.shape[dim])
        start, end = x.index_select(dim, lower), x.index_select(dim, upper)
        return end.sub_(start).mul_(share if dim == 3 else share[:, None]).add_(start)

    return between(between(x, 3), 2)


# The graph file


def expected_shapes():
    """Return {name: shape} of the graph constants that InceptionV3 needs."""
    shapes = {}
    for name, cin, cout, kernel, _ in LAYERS:
        shapes[f"{name}/conv2d_params"] = (*kernel, cin, cout)
        shapes.update({f"{name}/batchnorm/{part}": (cout,) for part in ("beta", "moving_mean", "moving_variance")})
    return {**shapes, "softmax/weights": (POOL_DIM, NUM_CLASSES)}


def read_graph(path):
    """Read the constants of the Inception graph from a file. Returns {name: float32 array}.

    :raises InputError: if the file is not the Inception graph. The message names the first missing node.
    """
    try:
        with open(path, "rb") as f:
            return parse_graph(f.read(), path)
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None


def parse_graph(data, source):
    """Read the constants of the Inception graph from bytes. Returns {name: float32 array}.

    :param source: the name of the file, for error messages.
    """
    try:
        from tensorboard.compat.proto.graph_pb2 import GraphDef
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError:
        raise InputError("reading the Inception graph needs tensorboard: pip install tensorboard") from None
    from google.protobuf.message import DecodeError  # tensorboard depends on protobuf

    try:
        nodes = {node.name: node for node in GraphDef.FromString(data).node}
    except DecodeError:
        raise InputError(f"{source}: not a TensorFlow graph, or truncated: get {FILE_NAME} again") from None
    constants = {}
    for name, shape in expected_shapes().items():
        if name not in nodes:
            raise InputError(f"{source}: not the Inception graph of 2015 ({FILE_NAME}): it has no node {name}")
        try:
            constants[name] = make_ndarray(nodes[name].attr["value"].tensor).astype(np.float32).reshape(shape)
        except (TypeError, ValueError):
            raise InputError(f"{source}: not the Inception graph of 2015: {name} has not the shape {shape}") from None
    return constants


def find_graph(path=""):
    """Return the path of the Inception graph: `path`, or else a local copy, or else a download in the cache folder."""
    if path:
        if not os.path.exists(path):
            raise InputError(f"--inception_path {path}: no such file: get {FILE_NAME} from {ADDRESS}")
        return path
    cache = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "guided_diffusion")
    places = [os.path.join(folder, FILE_NAME) for folder in ("", os.path.dirname(os.path.abspath(__file__)), cache)]
    found = next((place for place in places if os.path.exists(place)), None)
    return found or download(ADDRESS, places[-1])


def download(address, path):
    """Download the Inception graph to `path`."""
    say(f"downloading {FILE_NAME} (96 MB) from {address}")
    try:
        download_file(address, path, lambda part: parse_graph(Path(part).read_bytes(), FILE_NAME))
    except InputError as e:
        raise InputError(
            f"{FILE_NAME}: no local copy, and the download failed ({e}): get the file from {ADDRESS}, and save it as "
            f"{path} or give its path with --inception_path"
        ) from None
    return path
