#!/usr/bin/env python3
"""Write a GraphDef with the structure of the 2015 Inception graph and seeded weights: make_graph.py -o FILE

It needs numpy only: the protobuf wire format is encoded here by hand, with fields and attributes in a fixed order, so
that the file is always the same, byte for byte. The golden figures were computed with this file.
"""

import argparse
import enum
import json
import os
import struct

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
SEED = 20151205

# Protobuf's wire format


class DataType(enum.IntEnum):
    FLOAT, INT32, UINT8, STRING = 1, 3, 4, 7


FLOAT = DataType.FLOAT


def varint(n):
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes([*out, n])


def int_field(field, n):
    return varint(field << 3) + varint(n)


def float_field(field, x):
    return varint(field << 3 | 5) + struct.pack("<f", x)


def bytes_field(field, data):
    data = data.encode() if isinstance(data, str) else data
    return varint(field << 3 | 2) + varint(len(data)) + data


def tensor_proto(value):
    """TensorProto: dtype=1, tensor_shape=2, tensor_content=4, float_val=5, int_val=7, string_val=8."""
    if isinstance(value, bytes):
        return int_field(1, DataType.STRING) + bytes_field(2, b"") + bytes_field(8, value)
    shape = b"".join(bytes_field(2, int_field(1, side)) for side in value.shape)
    head = int_field(1, data_type(value)) + bytes_field(2, shape)
    if value.ndim:
        return head + bytes_field(4, value.astype(value.dtype.newbyteorder("<")).tobytes())
    single = struct.pack("<f", value) if data_type(value) == FLOAT else varint(int(value))
    return head + bytes_field(5 if data_type(value) == FLOAT else 7, single)


def data_type(value):
    return DataType.STRING if isinstance(value, bytes) else {"f": FLOAT, "i": DataType.INT32}[value.dtype.kind]


# How an AttrValue holds a Python value
ATTRIBUTES = {
    list: lambda v: bytes_field(1, bytes_field(3, b"".join(map(varint, v)))),
    str: lambda v: bytes_field(2, v),
    int: lambda v: int_field(3, v),
    float: lambda v: float_field(4, v),
    bool: lambda v: int_field(5, v),
    DataType: lambda v: int_field(6, v),
    bytes: lambda v: bytes_field(8, tensor_proto(v)),
    np.ndarray: lambda v: bytes_field(8, tensor_proto(v)),
}


def node_def(name, op, inputs, attributes):
    out = bytes_field(1, name) + bytes_field(2, op) + b"".join(bytes_field(3, i) for i in inputs)
    for key in sorted(attributes):
        value = attributes[key]
        out += bytes_field(5, bytes_field(1, key) + bytes_field(2, ATTRIBUTES[type(value)](value)))
    return bytes_field(1, out)  # GraphDef.node = 1


# The graph


def rounded(a):
    """Round to a multiple of 2**-12, which hides last-bit differences of float sums."""
    return (np.round(np.asarray(a, np.float64) * 2**12) / 2**12).astype(np.float32)


class Builder:
    def __init__(self, gains, softmax_std):
        self.gains, self.softmax_std = gains, softmax_std
        self.chunks = []
        self.mean = {}  # the expected mean of each channel of a node's output
        self.num_convs = 0

    def add(self, name, op, *inputs, **attributes):
        self.chunks.append(node_def(name, op, inputs, attributes))

    def const(self, name, value):
        self.add(name, "Const", dtype=data_type(value), value=value)

    def conv(self, name, x, cout, kh, kw, stride=1, padding="SAME"):
        """A layer: weights, Conv2D, four constants of the batch norm, the batch norm, a check and ReLU."""
        rng = np.random.default_rng([SEED, self.num_convs])
        cin = len(self.mean[x])
        w = rng.standard_normal((kh, kw, cin, cout))
        if self.num_convs:
            w -= w.mean((0, 1, 2))
        self.num_convs += 1
        w = (w * np.sqrt(2.0 / (kh * kw * cin))).astype(np.float32)
        beta = rounded(0.1 + 0.3 * rng.standard_normal(cout))
        gain = self.gains.get(name, 1.0)
        expected = (w.astype(np.float64).sum((0, 1)) * self.mean[x][:, None]).sum(0)
        weights, norm = name + "/conv2d_params", name + "/batchnorm"
        self.const(weights, w)
        self.add(name + "/Conv2D", "Conv2D", x, weights, T=FLOAT, padding=padding, strides=[1, stride, stride, 1],
                 use_cudnn_on_gpu=True)  # fmt: skip
        self.const(norm + "/beta", beta)
        self.const(norm + "/gamma", np.ones(cout, np.float32))  # every gamma of the real file is exactly 1
        self.const(norm + "/moving_mean", rounded(expected + 0.1 * np.sqrt(gain) * rng.standard_normal(cout)))
        self.const(norm + "/moving_variance", rounded(gain * np.exp(0.2 * rng.standard_normal(cout))))
        parameters = [f"{norm}/{kind}" for kind in ("moving_mean", "moving_variance", "beta", "gamma")]
        self.add(norm, "BatchNormWithGlobalNormalization", name + "/Conv2D", *parameters, T=FLOAT,
                 scale_after_normalization=False, variance_epsilon=0.001)  # fmt: skip
        self.check(name, norm)
        self.add(name, "Relu", name + "/control_dependency", T=FLOAT)
        # E relu(N(b, 1)) with a logistic stand-in for the normal CDF: plain numpy, no libm erf
        b = beta.astype(np.float64)
        self.mean[name] = b / (1 + np.exp(-1.702 * b)) + np.exp(-b * b / 2) / np.sqrt(2 * np.pi)
        return name

    def check(self, name, x):
        self.add(name + "/CheckNumerics", "CheckNumerics", x, T=FLOAT, message=x)
        self.add(name + "/control_dependency", "Identity", x, f"^{name}/CheckNumerics", T=FLOAT)

    def convs(self, scope, x, *layers):
        """Convolutions in a row: SCOPE/conv, SCOPE/conv_1, ... with these arguments."""
        for i, layer in enumerate(layers):
            x = self.conv(f"{scope}/conv_{i}" if i else f"{scope}/conv", x, *layer)
        return x

    def pool(self, name, x, op, size, stride, padding):
        self.check(name, x)
        types = {"T": FLOAT} if op == "AvgPool" else {}  # the 2015 MaxPool op had no T attribute
        self.add(name, op, name + "/control_dependency", **types, ksize=[1, size, size, 1], padding=padding,
                 strides=[1, stride, stride, 1])  # fmt: skip
        self.mean[name] = self.mean[x] + (0.6 if op == "MaxPool" else 0.0)
        return name

    def pool_and_conv(self, scope, x, op, cout):
        return self.convs(scope, self.pool(scope + "/pool", x, op, 3, 1, "SAME"), (cout, 1, 1))

    def join(self, scope, *xs):
        name = scope + "/join"
        self.const(name + "/concat_dim", np.array(3, np.int32))
        self.add(name, "Concat", name + "/concat_dim", *xs, N=len(xs), T=FLOAT)
        self.mean[name] = np.concatenate([self.mean[x] for x in xs])
        return name

    def images(self):
        """The nodes from a JPEG to the input of the first convolution."""
        self.const("DecodeJpeg/contents", b"")
        self.add("DecodeJpeg", "DecodeJpeg", "DecodeJpeg/contents", acceptable_fraction=1.0, channels=3,
                 fancy_upscaling=True, ratio=1, try_recover_truncated=False)  # fmt: skip
        self.add("Cast", "Cast", "DecodeJpeg", DstT=FLOAT, SrcT=DataType.UINT8)
        x = "Cast"
        for op, argument, value in (
            ("ExpandDims", "dim", np.array(0, np.int32)),
            ("ResizeBilinear", "size", np.array([299, 299], np.int32)),
            ("Sub", "y", np.array(128.0, np.float32)),
            ("Mul", "y", np.array(0.0078125, np.float32)),
        ):
            self.const(f"{op}/{argument}", value)
            self.add(op, op, x, f"{op}/{argument}", T=FLOAT)
            x = op
        self.mean[x] = np.zeros(3)
        return x

    def build(self):
        x = self.conv("conv", self.images(), 32, 3, 3, 2, "VALID")
        x = self.conv("conv_1", x, 32, 3, 3, 1, "VALID")
        x = self.conv("conv_2", x, 64, 3, 3)
        x = self.pool("pool", x, "MaxPool", 3, 2, "VALID")
        x = self.conv("conv_3", x, 80, 1, 1, 1, "VALID")
        x = self.conv("conv_4", x, 192, 3, 3, 1, "VALID")
        x = self.pool("pool_1", x, "MaxPool", 3, 2, "VALID")
        for s, pooled in (("mixed", 32), ("mixed_1", 64), ("mixed_2", 64)):
            a = self.convs(s, x, (64, 1, 1))
            b = self.convs(s + "/tower", x, (48, 1, 1), (64, 5, 5))
            c = self.convs(s + "/tower_1", x, (64, 1, 1), (96, 3, 3), (96, 3, 3))
            x = self.join(s, a, b, c, self.pool_and_conv(s + "/tower_2", x, "AvgPool", pooled))
        s = "mixed_3"
        a = self.convs(s, x, (384, 3, 3, 2, "VALID"))
        b = self.convs(s + "/tower", x, (64, 1, 1), (96, 3, 3), (96, 3, 3, 2, "VALID"))
        x = self.join(s, a, b, self.pool(s + "/pool", x, "MaxPool", 3, 2, "VALID"))
        for s, n in (("mixed_4", 128), ("mixed_5", 160), ("mixed_6", 160), ("mixed_7", 192)):
            a = self.convs(s, x, (192, 1, 1))
            b = self.convs(s + "/tower", x, (n, 1, 1), (n, 1, 7), (192, 7, 1))
            c = self.convs(s + "/tower_1", x, (n, 1, 1), (n, 7, 1), (n, 1, 7), (n, 7, 1), (192, 1, 7))
            x = self.join(s, a, b, c, self.pool_and_conv(s + "/tower_2", x, "AvgPool", 192))
        s = "mixed_8"
        a = self.convs(s + "/tower", x, (192, 1, 1), (320, 3, 3, 2, "VALID"))
        b = self.convs(s + "/tower_1", x, (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3, 2, "VALID"))
        x = self.join(s, a, b, self.pool(s + "/pool", x, "MaxPool", 3, 2, "VALID"))
        for s, op in (("mixed_9", "AvgPool"), ("mixed_10", "MaxPool")):
            branches = [self.convs(s, x, (320, 1, 1))]
            for tower, layers in (("tower", [(384, 1, 1)]), ("tower_1", [(448, 1, 1), (384, 3, 3)])):
                last = self.convs(f"{s}/{tower}", x, *layers)
                branches.append(self.conv(f"{s}/{tower}/mixed/conv", last, 384, 1, 3))
                branches.append(self.conv(f"{s}/{tower}/mixed/conv_1", last, 384, 3, 1))
            x = self.join(s, *branches, self.pool_and_conv(s + "/tower_2", x, op, 192))
        self.pool("pool_3", x, "AvgPool", 8, 1, "VALID")
        self.const("pool_3/_reshape/shape", np.array([1, 2048], np.int32))
        self.add("pool_3/_reshape", "Reshape", "pool_3", "pool_3/_reshape/shape", T=FLOAT)
        rng = np.random.default_rng([SEED, 10**6])
        self.const("softmax/weights", (self.softmax_std * rng.standard_normal((2048, 1008))).astype(np.float32))
        self.const("softmax/biases", (0.1 * rng.standard_normal(1008)).astype(np.float32))
        self.add("softmax/logits/MatMul", "MatMul", "pool_3/_reshape", "softmax/weights", T=FLOAT, transpose_a=False,
                 transpose_b=False)  # fmt: skip
        self.add("softmax/logits", "BiasAdd", "softmax/logits/MatMul", "softmax/biases", T=FLOAT)
        self.add("softmax", "Softmax", "softmax/logits", T=FLOAT)
        return b"".join(self.chunks)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--out", required=True)
    with open(os.path.join(HERE, "gains.json")) as f:
        builder = Builder(**json.load(f))
    with open(parser.parse_args().out, "wb") as f:
        f.write(builder.build())
