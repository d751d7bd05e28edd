#!/usr/bin/env python3
"""Write a GraphDef with the structure of the 2015 Inception graph and seeded weights.

Needs numpy only: the protobuf wire format is encoded here by hand, in a fixed
field and attribute order, so that one seed gives one byte sequence.

    python make_graph.py [-o FILE] [--seed N] [--compact-gamma]
"""

import argparse
import json
import os
import struct
import sys

import numpy as np

DT_FLOAT, DT_INT32, DT_UINT8, DT_STRING = 1, 3, 4, 7
HERE = os.path.dirname(os.path.abspath(__file__))


# ---------------------------------------------------------------- wire format
def varint(n):
    if n < 0:
        n += 1 << 64
    out = bytearray()
    while True:
        b = n & 0x7F
        n >>= 7
        if n:
            out.append(b | 0x80)
        else:
            out.append(b)
            return bytes(out)


def tag(field, wire):
    return varint(field << 3 | wire)


def ld(field, data):
    if isinstance(data, str):
        data = data.encode()
    return tag(field, 2) + varint(len(data)) + data


def vi(field, n):
    return tag(field, 0) + varint(n)


def f32(field, x):
    return tag(field, 5) + struct.pack("<f", x)


def shape_proto(shape):
    return b"".join(ld(2, vi(1, d) if d else b"") for d in shape)


def tensor_proto(a, fill=False):
    """TensorProto: dtype=1, tensor_shape=2, tensor_content=4, float_val=5, int_val=7, string_val=8."""
    if isinstance(a, bytes):
        return vi(1, DT_STRING) + ld(2, b"") + ld(8, a)
    dt = {np.dtype("float32"): DT_FLOAT, np.dtype("int32"): DT_INT32}[a.dtype]
    head = vi(1, dt) + ld(2, shape_proto(a.shape))
    if a.ndim == 0 or fill:
        v = a.reshape(-1)[0]
        if dt == DT_FLOAT:
            return head + ld(5, struct.pack("<f", float(v)))
        return head + ld(7, varint(int(v)))
    return head + ld(4, a.astype(a.dtype.newbyteorder("<")).tobytes())


# AttrValue: list=1 s=2 i=3 f=4 b=5 type=6 shape=7 tensor=8
def a_type(t):
    return vi(6, t)


def a_ints(v):
    return ld(1, ld(3, b"".join(varint(x) for x in v)))


def a_str(s):
    return ld(2, s)


def a_int(i):
    return vi(3, i)


def a_float(x):
    return f32(4, x)


def a_bool(b):
    return vi(5, int(b))


def a_tensor(t):
    return ld(8, t)


def node_def(name, op, inputs=(), attrs=()):
    out = ld(1, name) + ld(2, op)
    for i in inputs:
        out += ld(3, i)
    for key in sorted(dict(attrs)):
        out += ld(5, ld(1, key) + ld(2, dict(attrs)[key]))
    return ld(1, out)  # GraphDef.node = 1


# -------------------------------------------------------------------- weights
def q(a, bits=12):
    """Round to a multiple of 2**-bits: hides last-bit differences of float sums."""
    return (np.round(np.asarray(a, np.float64) * 2**bits) / 2**bits).astype(np.float32)


class Builder:
    def __init__(self, seed, gains, compact_gamma=False, softmax_std=0.5):
        self.seed, self.gains, self.compact = seed, gains, compact_gamma
        self.softmax_std = softmax_std
        self.chunks, self.names = [], []
        self.ops = []  # (name, op, inputs, python attrs, value): for the calibrator
        self.mean = {}  # expected per-channel mean of each node's output
        self.n_conv = 0

    def add(self, name, op, inputs=(), attrs=(), value=None, py=None):
        self.names.append(name)
        self.chunks.append(node_def(name, op, inputs, attrs))
        self.ops.append((name, op, list(inputs), py or {}, value))
        return name

    def const(self, name, value, fill=False):
        t = tensor_proto(value, fill)
        dt = DT_STRING if isinstance(value, bytes) else {"f": DT_FLOAT, "i": DT_INT32}[value.dtype.kind]
        return self.add(name, "Const", (), {"dtype": a_type(dt), "value": a_tensor(t)}, value=value)

    # a layer: conv2d_params, Conv2D, 4 batchnorm constants, batchnorm, CheckNumerics, control_dependency, Relu
    def conv(self, name, x, cin, cout, kh, kw, stride=1, padding="SAME"):
        idx, self.n_conv = self.n_conv, self.n_conv + 1
        rng = np.random.default_rng([self.seed, idx])
        w = rng.standard_normal((kh, kw, cin, cout))
        if idx:
            w -= w.mean((0, 1, 2))
        w = (w * np.sqrt(2.0 / (kh * kw * cin))).astype(np.float32)
        beta = q(0.1 + 0.3 * rng.standard_normal(cout))
        gamma = np.ones(cout, np.float32)  # every gamma of the real file is exactly 1
        gain = self.gains.get(name, 1.0)
        expect = (w.astype(np.float64).sum((0, 1)) * self.mean[x][:, None]).sum(0)
        mean = q(expect + 0.1 * np.sqrt(gain) * rng.standard_normal(cout))
        var = q(gain * np.exp(0.2 * rng.standard_normal(cout)))
        self.const(name + "/conv2d_params", w)
        self.add(
            name + "/Conv2D",
            "Conv2D",
            [x, name + "/conv2d_params"],
            {
                "T": a_type(DT_FLOAT),
                "padding": a_str(padding),
                "strides": a_ints([1, stride, stride, 1]),
                "use_cudnn_on_gpu": a_bool(True),
            },
            py=dict(stride=stride, padding=padding),
        )
        bn = name + "/batchnorm"
        self.const(bn + "/beta", beta)
        self.const(bn + "/gamma", gamma, fill=self.compact)
        self.const(bn + "/moving_mean", mean)
        self.const(bn + "/moving_variance", var)
        self.add(
            bn,
            "BatchNormWithGlobalNormalization",
            [name + "/Conv2D", bn + "/moving_mean", bn + "/moving_variance", bn + "/beta", bn + "/gamma"],
            {"T": a_type(DT_FLOAT), "scale_after_normalization": a_bool(False), "variance_epsilon": a_float(0.001)},
            py=dict(beta=beta, mean=mean, var=var),
        )
        self.check(name, bn)
        self.add(name, "Relu", [name + "/control_dependency"], {"T": a_type(DT_FLOAT)})
        # E relu(N(b, 1)) with a logistic stand-in for the normal CDF: plain numpy, no libm erf
        b = beta.astype(np.float64)
        self.mean[name] = b / (1 + np.exp(-1.702 * b)) + np.exp(-b * b / 2) / np.sqrt(2 * np.pi)
        return name

    def check(self, name, x):
        self.add(name + "/CheckNumerics", "CheckNumerics", [x], {"T": a_type(DT_FLOAT), "message": a_str(x)})
        self.add(name + "/control_dependency", "Identity", [x, "^" + name + "/CheckNumerics"], {"T": a_type(DT_FLOAT)})

    def pool(self, name, x, op, k, stride, padding):
        self.check(name, x)
        attrs = {"ksize": a_ints([1, k, k, 1]), "padding": a_str(padding), "strides": a_ints([1, stride, stride, 1])}
        if op == "AvgPool":
            attrs["T"] = a_type(DT_FLOAT)  # the 2015 MaxPool op had no T attribute
        self.add(name, op, [name + "/control_dependency"], attrs, py=dict(k=k, stride=stride, padding=padding))
        self.mean[name] = self.mean[x] + (0.6 if op == "MaxPool" else 0.0)
        return name

    def join(self, scope, xs):
        self.const(scope + "/join/concat_dim", np.array(3, np.int32))
        self.add(
            scope + "/join", "Concat", [scope + "/join/concat_dim"] + xs, {"N": a_int(len(xs)), "T": a_type(DT_FLOAT)}
        )
        self.mean[scope + "/join"] = np.concatenate([self.mean[x] for x in xs])
        return scope + "/join"

    def build(self):
        F = a_type(DT_FLOAT)
        self.const("DecodeJpeg/contents", b"")
        self.add(
            "DecodeJpeg",
            "DecodeJpeg",
            ["DecodeJpeg/contents"],
            {
                "acceptable_fraction": a_float(1.0),
                "channels": a_int(3),
                "fancy_upscaling": a_bool(True),
                "ratio": a_int(1),
                "try_recover_truncated": a_bool(False),
            },
        )
        self.add("Cast", "Cast", ["DecodeJpeg"], {"DstT": F, "SrcT": a_type(DT_UINT8)})
        self.const("ExpandDims/dim", np.array(0, np.int32))
        self.add("ExpandDims", "ExpandDims", ["Cast", "ExpandDims/dim"], {"T": F})
        self.const("ResizeBilinear/size", np.array([299, 299], np.int32))
        self.add("ResizeBilinear", "ResizeBilinear", ["ExpandDims", "ResizeBilinear/size"], {"T": F})
        self.const("Sub/y", np.array(128.0, np.float32))
        self.add("Sub", "Sub", ["ResizeBilinear", "Sub/y"], {"T": F})
        self.const("Mul/y", np.array(0.0078125, np.float32))
        self.add("Mul", "Mul", ["Sub", "Mul/y"], {"T": F})
        self.mean["Mul"] = np.zeros(3)
        x = self.conv("conv", "Mul", 3, 32, 3, 3, 2, "VALID")
        x = self.conv("conv_1", x, 32, 32, 3, 3, 1, "VALID")
        x = self.conv("conv_2", x, 32, 64, 3, 3)
        x = self.pool("pool", x, "MaxPool", 3, 2, "VALID")
        x = self.conv("conv_3", x, 64, 80, 1, 1, 1, "VALID")
        x = self.conv("conv_4", x, 80, 192, 3, 3, 1, "VALID")
        x = self.pool("pool_1", x, "MaxPool", 3, 2, "VALID")
        cin = 192
        for s, pool_ch in (("mixed", 32), ("mixed_1", 64), ("mixed_2", 64)):
            a = self.conv(s + "/conv", x, cin, 64, 1, 1)
            b = self.conv(s + "/tower/conv", x, cin, 48, 1, 1)
            b = self.conv(s + "/tower/conv_1", b, 48, 64, 5, 5)
            c = self.conv(s + "/tower_1/conv", x, cin, 64, 1, 1)
            c = self.conv(s + "/tower_1/conv_1", c, 64, 96, 3, 3)
            c = self.conv(s + "/tower_1/conv_2", c, 96, 96, 3, 3)
            d = self.pool(s + "/tower_2/pool", x, "AvgPool", 3, 1, "SAME")
            d = self.conv(s + "/tower_2/conv", d, cin, pool_ch, 1, 1)
            x = self.join(s, [a, b, c, d])
            cin = 64 + 64 + 96 + pool_ch
        s = "mixed_3"
        a = self.conv(s + "/conv", x, cin, 384, 3, 3, 2, "VALID")
        b = self.conv(s + "/tower/conv", x, cin, 64, 1, 1)
        b = self.conv(s + "/tower/conv_1", b, 64, 96, 3, 3)
        b = self.conv(s + "/tower/conv_2", b, 96, 96, 3, 3, 2, "VALID")
        c = self.pool(s + "/pool", x, "MaxPool", 3, 2, "VALID")
        x = self.join(s, [a, b, c])
        for s, c7 in (("mixed_4", 128), ("mixed_5", 160), ("mixed_6", 160), ("mixed_7", 192)):
            a = self.conv(s + "/conv", x, 768, 192, 1, 1)
            b = self.conv(s + "/tower/conv", x, 768, c7, 1, 1)
            b = self.conv(s + "/tower/conv_1", b, c7, c7, 1, 7)
            b = self.conv(s + "/tower/conv_2", b, c7, 192, 7, 1)
            c = self.conv(s + "/tower_1/conv", x, 768, c7, 1, 1)
            c = self.conv(s + "/tower_1/conv_1", c, c7, c7, 7, 1)
            c = self.conv(s + "/tower_1/conv_2", c, c7, c7, 1, 7)
            c = self.conv(s + "/tower_1/conv_3", c, c7, c7, 7, 1)
            c = self.conv(s + "/tower_1/conv_4", c, c7, 192, 1, 7)
            d = self.pool(s + "/tower_2/pool", x, "AvgPool", 3, 1, "SAME")
            d = self.conv(s + "/tower_2/conv", d, 768, 192, 1, 1)
            x = self.join(s, [a, b, c, d])
        s = "mixed_8"
        a = self.conv(s + "/tower/conv", x, 768, 192, 1, 1)
        a = self.conv(s + "/tower/conv_1", a, 192, 320, 3, 3, 2, "VALID")
        b = self.conv(s + "/tower_1/conv", x, 768, 192, 1, 1)
        b = self.conv(s + "/tower_1/conv_1", b, 192, 192, 1, 7)
        b = self.conv(s + "/tower_1/conv_2", b, 192, 192, 7, 1)
        b = self.conv(s + "/tower_1/conv_3", b, 192, 192, 3, 3, 2, "VALID")
        c = self.pool(s + "/pool", x, "MaxPool", 3, 2, "VALID")
        x = self.join(s, [a, b, c])
        cin = 1280
        for s, op in (("mixed_9", "AvgPool"), ("mixed_10", "MaxPool")):
            a = self.conv(s + "/conv", x, cin, 320, 1, 1)
            b = self.conv(s + "/tower/conv", x, cin, 384, 1, 1)
            b1 = self.conv(s + "/tower/mixed/conv", b, 384, 384, 1, 3)
            b2 = self.conv(s + "/tower/mixed/conv_1", b, 384, 384, 3, 1)
            c = self.conv(s + "/tower_1/conv", x, cin, 448, 1, 1)
            c = self.conv(s + "/tower_1/conv_1", c, 448, 384, 3, 3)
            c1 = self.conv(s + "/tower_1/mixed/conv", c, 384, 384, 1, 3)
            c2 = self.conv(s + "/tower_1/mixed/conv_1", c, 384, 384, 3, 1)
            d = self.pool(s + "/tower_2/pool", x, op, 3, 1, "SAME")
            d = self.conv(s + "/tower_2/conv", d, cin, 192, 1, 1)
            x = self.join(s, [a, b1, b2, c1, c2, d])
            cin = 2048
        self.pool("pool_3", x, "AvgPool", 8, 1, "VALID")
        self.const("pool_3/_reshape/shape", np.array([1, 2048], np.int32))
        self.add("pool_3/_reshape", "Reshape", ["pool_3", "pool_3/_reshape/shape"], {"T": F})
        rng = np.random.default_rng([self.seed, 10**6])
        self.const("softmax/weights", (self.softmax_std * rng.standard_normal((2048, 1008))).astype(np.float32))
        self.const("softmax/biases", (0.1 * rng.standard_normal(1008)).astype(np.float32))
        self.add(
            "softmax/logits/MatMul",
            "MatMul",
            ["pool_3/_reshape", "softmax/weights"],
            {"T": F, "transpose_a": a_bool(False), "transpose_b": a_bool(False)},
        )
        self.add("softmax/logits", "BiasAdd", ["softmax/logits/MatMul", "softmax/biases"], {"T": F})
        self.add("softmax", "Softmax", ["softmax/logits"], {"T": F})
        return b"".join(self.chunks)


def load_gains():
    with open(os.path.join(HERE, "gains.json")) as f:
        return json.load(f)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("-o", "--out", default=os.path.join(HERE, "classify_image_graph_def.pb"))
    ap.add_argument("--seed", type=int, default=20151205)
    ap.add_argument("--compact-gamma", action="store_true", help="write gamma as one repeated float_val")
    args = ap.parse_args()
    g = load_gains()
    b = Builder(args.seed, g["gains"], args.compact_gamma, g["softmax_std"])
    data = b.build()
    with open(args.out, "wb") as f:
        f.write(data)
    print(args.out, len(data), "bytes", len(b.names), "nodes", b.n_conv, "convs", file=sys.stderr)


if __name__ == "__main__":
    main()
