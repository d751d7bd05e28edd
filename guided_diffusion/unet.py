"""The networks of ADM: a UNet with attention at several resolutions, its encoder as a classifier, and an upsampler.

Parameter names, their order and the order in which layers are made are those of the released checkpoints: they decide
which weights load, what an optimiser's state refers to and what a seed initialises.

From top to bottom: resampling, ResBlock, AttentionBlock and what it attends with, the encoder that all networks share,
UNetModel, SuperResModel, EncoderUNetModel.
"""

from abc import abstractmethod

import torch as th
import torch.nn as nn
import torch.nn.functional as F

from .errors import InputError, choose
from .nn import (
    NormFirst,
    SiLU,
    adaptive_avg_pool_nd,
    avg_pool_nd,
    checkpoint,
    conv_nd,
    convert_convs,
    linear,
    normalization,
    timestep_embedding,
    zero_module,
)


class TimestepBlock(nn.Module):
    """A module whose `forward(x, emb)` also takes the embedding of the timestep (and class)."""

    @abstractmethod
    def forward(self, x, emb):
        """Apply the module to x [N, C, ...] given emb [N, emb_channels]."""


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """A sequence that hands the embedding to those of its children that take it."""

    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by two, then a convolution if `use_conv`. 3D data keeps its first spatial axis.

    [N, channels, ...] -> [N, out_channels, ...]
    """

    def __init__(self, channels, use_conv, dims=2, out_channels=None):
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.dims = dims
        if use_conv:
            self.conv = conv_nd(dims, self.channels, self.out_channels, 3, padding=1)

    def forward(self, x):
        if x.device.type == "cpu":  # where F.interpolate takes five times as long
            first = 3 if self.dims == 3 else 2
            for axis in reversed(range(first, x.ndim)):
                x = x.repeat_interleave(2, axis)
        else:
            x = F.interpolate(x, scale_factor=(1, 2, 2) if self.dims == 3 else 2, mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """Downsampling by two, with a strided convolution or an average pool. 3D data keeps its first spatial axis.

    [N, channels, ...] -> [N, out_channels, ...]
    """

    def __init__(self, channels, use_conv, dims=2, out_channels=None):
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.dims = dims
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, self.channels, self.out_channels, 3, stride=stride, padding=1)
        elif self.channels != self.out_channels:
            raise InputError(f"downsampling without a convolution cannot turn {channels} channels into {out_channels}")
        else:
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)

    def forward(self, x):
        return self.op(x)


class ResBlock(TimestepBlock):
    """A residual block, optionally resampling, conditioned on the embedding.

    [N, channels, ...], [N, emb_channels] -> [N, out_channels, ...]

    :param channels: input channels.
    :param emb_channels: width of the embedding.
    :param dropout: its rate.
    :param out_channels: output channels; as many as come in by default.
    :param use_conv: where the channels change, make the skip connection a 3x3 convolution rather than a 1x1.
    :param use_scale_shift_norm: adaptive group norm (ADM, section 3.1): the embedding scales and shifts the second
        norm's output; otherwise it is added before that norm.
    :param use_checkpoint: compute the block again in the backward pass instead of keeping its activations.
    :param up, down: resample both branches by two.
    """

    def __init__(
        self,
        channels,
        emb_channels,
        dropout,
        out_channels=None,
        use_conv=False,
        use_scale_shift_norm=False,
        dims=2,
        use_checkpoint=False,
        up=False,
        down=False,
    ):
        super().__init__()
        self.channels = channels
        self.emb_channels = emb_channels
        self.dropout = dropout
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm

        self.in_layers = NormFirst(
            normalization(channels),
            SiLU(),
            conv_nd(dims, channels, self.out_channels, 3, padding=1),
        )
        self.updown = up or down
        if up:
            self.h_upd, self.x_upd = Upsample(channels, False, dims), Upsample(channels, False, dims)
        elif down:
            self.h_upd, self.x_upd = Downsample(channels, False, dims), Downsample(channels, False, dims)
        else:
            self.h_upd = self.x_upd = nn.Identity()
        self.emb_layers = nn.Sequential(
            SiLU(),
            linear(emb_channels, 2 * self.out_channels if use_scale_shift_norm else self.out_channels),
        )
        self.out_layers = NormFirst(
            normalization(self.out_channels),
            SiLU(),
            nn.Dropout(p=dropout),
            zero_module(conv_nd(dims, self.out_channels, self.out_channels, 3, padding=1)),
        )
        if self.out_channels == channels:
            self.skip_connection = nn.Identity()
        elif use_conv:
            self.skip_connection = conv_nd(dims, channels, self.out_channels, 3, padding=1)
        else:
            self.skip_connection = conv_nd(dims, channels, self.out_channels, 1)

    def forward(self, x, emb):
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x, emb):
        h = self.in_layers(x, resample=self.h_upd, checkpointed=self.use_checkpoint)
        emb = self.emb_layers(emb)
        if self.use_scale_shift_norm:
            h = self.out_layers(h, *emb.chunk(2, dim=1), checkpointed=self.use_checkpoint)
        else:
            h = h + emb.type(h.dtype).reshape(*emb.shape, *[1] * (h.ndim - 2))
            h = self.out_layers(h, checkpointed=self.use_checkpoint)
        return self.skip_connection(self.x_upd(x)) + h


class AttentionBlock(nn.Module):
    """Residual self-attention between all positions: [N, channels, ...] -> the same.

    :param num_heads: the number of heads, unless `num_head_channels` gives their width.
    :param use_checkpoint: compute the block again in the backward pass instead of keeping its activations.
    :param use_new_attention_order: how the projection's channels are laid out: see QKVAttention and QKVAttentionLegacy.
    """

    def __init__(
        self,
        channels,
        num_heads=1,
        num_head_channels=-1,
        use_checkpoint=False,
        use_new_attention_order=False,
    ):
        super().__init__()
        self.channels = channels
        self.num_heads = count_heads(channels, num_heads, num_head_channels)
        self.use_checkpoint = use_checkpoint
        self.norm = normalization(channels)
        self.qkv = conv_nd(1, channels, channels * 3, 1)
        self.attention = (QKVAttention if use_new_attention_order else QKVAttentionLegacy)(self.num_heads)
        self.proj_out = zero_module(conv_nd(1, channels, channels, 1))

    def forward(self, x):
        return checkpoint(self._forward, (x,), self.parameters(), self.use_checkpoint)

    def _forward(self, x):
        h = self.norm(x).flatten(2)
        if h.device.type == "cpu":  # channels side by side, as attention wants them: cheaper here than after projection
            h = h.mT.contiguous().mT
        h = self.proj_out(self.attention(self.qkv(h)))
        return x + h.reshape(x.shape)


def count_heads(channels, num_heads, num_head_channels):
    """How many attention heads `channels` make: `num_heads`, or as many as have `num_head_channels` each."""
    if num_head_channels != -1:
        if num_head_channels < 1 or channels % num_head_channels:
            raise InputError(
                f"{channels} channels cannot be split into attention heads of {num_head_channels}: change "
                f"num_head_channels, or num_channels and channel_mult (for a classifier: classifier_width)"
            )
        return channels // num_head_channels
    if num_heads < 1 or channels % num_heads:
        raise InputError(f"{channels} channels cannot be split into {num_heads} attention heads: change num_heads")
    return num_heads


class QKVAttention(nn.Module):
    """Attention over a projection whose channels are all queries, then all keys, then all values.

    [N, 3 * n_heads * C, T] -> [N, n_heads * C, T]
    """

    def __init__(self, n_heads):
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv):
        n, width, length = qkv.shape
        qkv = qkv.mT.contiguous().view(n, length, 3, self.n_heads, width // (3 * self.n_heads))
        return attend(*qkv.unbind(2))

    @staticmethod
    def count_flops(model, _x, y):
        count_flops_attn(model, _x, y)


class QKVAttentionLegacy(nn.Module):
    """Attention over a projection whose channels are each head's queries, keys and values in turn.

    [N, n_heads * 3 * C, T] -> [N, n_heads * C, T]
    """

    def __init__(self, n_heads):
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv):
        n, width, length = qkv.shape
        qkv = qkv.mT.contiguous().view(n, length, self.n_heads, 3, width // (3 * self.n_heads))
        return attend(*qkv.unbind(3))

    @staticmethod
    def count_flops(model, _x, y):
        count_flops_attn(model, _x, y)


def attend(q, k, v):
    """Scaled dot-product attention: q, k, v [N, T, heads, C] -> [N, heads * C, T].

    The channels of a head must lie side by side in memory: the fused kernels take nothing else.
    """
    h = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # [N, heads, T, C]
    return h.transpose(1, 2).flatten(2).mT


def count_flops_attn(model, _x, y):
    """A counter for the `thop` package: two matrix products, of T x T x C multiply-adds each, for every sample."""
    n, c, *spatial = y[0].shape
    length = 1
    for size in spatial:
        length *= size
    model.total_ops += th.DoubleTensor([2 * n * length**2 * c])


class AttentionPool2d(nn.Module):
    """Pool by attention from the mean over all positions (CLIP): [N, embed_dim, S, S] -> [N, output_dim].

    :param spacial_dim: S.
    :param num_heads_channels: the width of a head.
    """

    def __init__(self, spacial_dim: int, embed_dim: int, num_heads_channels: int, output_dim: int = None):
        super().__init__()
        self.num_heads = count_heads(embed_dim, None, num_heads_channels)
        self.positional_embedding = nn.Parameter(th.randn(embed_dim, spacial_dim**2 + 1) / embed_dim**0.5)
        self.qkv_proj = conv_nd(1, embed_dim, 3 * embed_dim, 1)
        self.c_proj = conv_nd(1, embed_dim, output_dim or embed_dim, 1)
        self.attention = QKVAttention(self.num_heads)

    def forward(self, x):
        x = x.flatten(2)  # [N, C, S*S]
        positions = self.positional_embedding.shape[1] - 1
        if x.shape[2] != positions:
            raise InputError(f"attention pooling was built for {positions} positions and is given {x.shape[2]}")
        x = th.cat([x.mean(dim=-1, keepdim=True), x], dim=-1)  # [N, C, 1 + S*S]
        x = x + self.positional_embedding.to(x.dtype)
        return self.c_proj(self.attention(self.qkv_proj(x)))[:, :, 0]


class _Encoder(nn.Module):
    """The half of the UNet that the classifier has too: time_embed, input_blocks and middle_block.

    A base class rather than a submodule, so that parameter names stay as they are in the released checkpoints.
    UNetModel documents the arguments.
    """

    def __init__(self, arguments):
        """:param arguments: the locals() of a subclass's constructor: they become attributes of the same names."""
        super().__init__()
        for name, value in arguments.items():
            if name not in ("self", "__class__"):
                setattr(self, name, value)
        if self.use_fp16 and self.use_bf16:
            raise InputError("use_fp16 and use_bf16 exclude each other: choose one")
        self.dtype = th.float16 if self.use_fp16 else th.bfloat16 if self.use_bf16 else th.float32
        if self.num_res_blocks < 1 or not 0 <= self.dropout <= 1:
            raise InputError(
                f"num_res_blocks {self.num_res_blocks} must be at least 1, and dropout {self.dropout} from 0 to 1"
            )
        widths = [int(mult * self.model_channels) for mult in self.channel_mult]
        if not widths or min(widths) < 1:
            raise InputError(
                f"num_channels {self.model_channels} with channel_mult {tuple(self.channel_mult)}: there must be a "
                f"level, and each needs a width of at least 1"
            )
        if self.num_heads_upsample == -1:
            self.num_heads_upsample = self.num_heads

        self.emb_channels = 4 * self.model_channels
        self.time_embed = nn.Sequential(
            linear(self.model_channels, self.emb_channels),
            SiLU(),
            linear(self.emb_channels, self.emb_channels),
        )
        if self.num_classes is not None:
            self.label_emb = nn.Embedding(self.num_classes, self.emb_channels)
        self._build_encoder()

    def _build_encoder(self):
        """Make input_blocks and middle_block. Also note, for a decoder and for pooling, the width after each block."""
        ch = int(self.channel_mult[0] * self.model_channels)
        stem = conv_nd(self.dims, self.in_channels, ch, 3, padding=1)
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(stem)])
        widths = [ch]
        ds = 1
        for level, mult in enumerate(self.channel_mult):
            out_ch = int(mult * self.model_channels)
            for _ in range(self.num_res_blocks):
                self.input_blocks.append(self._level_block(ch, out_ch, ds, self.num_heads))
                ch = out_ch
                widths.append(ch)
            if level != len(self.channel_mult) - 1:
                if self.resblock_updown:
                    down = self._res_block(ch, ch, down=True)
                else:
                    down = Downsample(ch, self.conv_resample, dims=self.dims, out_channels=ch)
                self.input_blocks.append(TimestepEmbedSequential(down))
                widths.append(ch)
                ds *= 2
        self.middle_block = TimestepEmbedSequential(
            self._res_block(ch, ch),
            self._attention_block(ch, self.num_heads),
            self._res_block(ch, ch),
        )
        self._skip_widths = widths
        self._feature_size = sum(widths) + ch
        self._encoder_ds = ds

    def _level_block(self, ch, out_ch, ds, num_heads):
        """A residual block, and attention after it where the resolution (1/ds of the image's) has any."""
        layers = [self._res_block(ch, out_ch)]
        if ds in self.attention_resolutions:
            layers.append(self._attention_block(out_ch, num_heads))
        return TimestepEmbedSequential(*layers)

    def _res_block(self, ch, out_ch, **resample):
        return ResBlock(
            ch,
            self.emb_channels,
            self.dropout,
            out_channels=out_ch,
            dims=self.dims,
            use_checkpoint=self.use_checkpoint,
            use_scale_shift_norm=self.use_scale_shift_norm,
            **resample,
        )

    def _attention_block(self, ch, num_heads):
        return AttentionBlock(
            ch,
            num_heads=num_heads,
            num_head_channels=self.num_head_channels,
            use_checkpoint=self.use_checkpoint,
            use_new_attention_order=self.use_new_attention_order,
        )

    def _check_size(self, sizes):
        """Refuse an image size that does not come back from the levels as it was."""
        sizes = sizes[-2:]  # of 3D data, the first axis is not resampled
        halvings = len(self.channel_mult) - 1
        if any(size < 1 or size % 2**halvings for size in sizes):
            raise InputError(
                f"an image size of {'x'.join(map(str, sizes))} cannot be halved {halvings} times: the "
                f"{len(self.channel_mult)} levels of channel_mult {tuple(self.channel_mult)} need a multiple of "
                f"{2**halvings}"
            )

    def _torso(self):
        """The modules that run in reduced precision."""
        return [self.input_blocks, self.middle_block]

    def _convert(self, dtype):
        for module in self._torso():
            convert_convs(module, dtype)
        self.dtype = dtype

    def convert_to_fp16(self):
        """Run the torso's convolutions in float16. Norms, embeddings and the output stay in float32."""
        self._convert(th.float16)

    def convert_to_bf16(self):
        """Run the torso's convolutions in bfloat16. Norms, embeddings and the output stay in float32."""
        self._convert(th.bfloat16)

    def convert_to_fp32(self):
        """Run everything in float32."""
        self._convert(th.float32)

    def _encode(self, x, timesteps, y=None):
        """Run the encoder: the embedding, the output of every input block, and that of the middle block."""
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        if y is not None:
            emb = emb + self.label_emb(y)
        h = x.type(self.dtype)
        hs = []
        for block in self.input_blocks:
            h = block(h, emb)
            hs.append(h)
        return emb, hs, self.middle_block(h, emb)


class UNetModel(_Encoder):
    """The diffusion model's UNet.

    :param image_size: the images' side, or their (height, width): checked against the depth. None leaves it unchecked.
    :param in_channels: channels of the input.
    :param model_channels: the base width, which channel_mult multiplies.
    :param out_channels: channels of the output.
    :param num_res_blocks: residual blocks a level of the encoder; the decoder has one more.
    :param attention_resolutions: the downsampling factors that have attention: {4} is attention at a quarter of the
        image's resolution.
    :param dropout: its rate.
    :param channel_mult: a level's width over model_channels, one for each level; may hold fractions.
    :param conv_resample: resample with learned convolutions, where resblock_updown does not.
    :param dims: 1, 2 or 3 for sequences, images or videos (whose first axis keeps its length).
    :param num_classes: makes the model class-conditional with so many classes.
    :param use_checkpoint: save memory in training by computing activations twice.
    :param use_fp16, use_bf16: the torso's precision. Call convert_to_fp16() or convert_to_bf16() once weights are in.
    :param num_heads: heads of each attention block, unless num_head_channels gives their width.
    :param num_heads_upsample: another number of heads for the decoder.
    :param use_scale_shift_norm: see ResBlock.
    :param resblock_updown: resample inside residual blocks, as BigGAN does.
    :param use_new_attention_order: see AttentionBlock.
    :raises InputError: for combinations that cannot work, with the numbers.
    """

    def __init__(
        self,
        image_size,
        in_channels,
        model_channels,
        out_channels,
        num_res_blocks,
        attention_resolutions,
        dropout=0,
        channel_mult=(1, 2, 4, 8),
        conv_resample=True,
        dims=2,
        num_classes=None,
        use_checkpoint=False,
        use_fp16=False,
        num_heads=1,
        num_head_channels=-1,
        num_heads_upsample=-1,
        use_scale_shift_norm=False,
        resblock_updown=False,
        use_new_attention_order=False,
        use_bf16=False,
    ):
        super().__init__(locals())
        if image_size is not None:
            self._check_size(image_size if isinstance(image_size, (tuple, list)) else [image_size])
        skip_widths = list(self._skip_widths)
        ch, ds = skip_widths[-1], self._encoder_ds
        self.output_blocks = nn.ModuleList([])
        for level, mult in reversed(list(enumerate(channel_mult))):
            out_ch = int(mult * model_channels)
            for i in range(num_res_blocks + 1):
                block = self._level_block(ch + skip_widths.pop(), out_ch, ds, self.num_heads_upsample)
                ch = out_ch
                if level and i == num_res_blocks:
                    if resblock_updown:
                        block.append(self._res_block(ch, ch, up=True))
                    else:
                        block.append(Upsample(ch, conv_resample, dims=dims, out_channels=ch))
                    ds //= 2
                self.output_blocks.append(block)
        self.out = NormFirst(
            normalization(ch),
            SiLU(),
            zero_module(conv_nd(dims, ch, out_channels, 3, padding=1)),
        )

    def _torso(self):
        return super()._torso() + [self.output_blocks]

    def forward(self, x, timesteps, y=None):
        """Apply the model.

        :param x: [N, in_channels, ...] float32.
        :param timesteps: [N], may be fractional.
        :param y: [N] int64 labels, if and only if the model is class-conditional.
        :return: [N, out_channels, ...] of x's dtype.
        """
        if (y is not None) != (self.num_classes is not None):
            raise ValueError("pass labels y to a class-conditional model, and to no other")
        if y is not None and y.shape != x.shape[:1]:
            raise ValueError(f"labels of shape {tuple(y.shape)} for a batch of {x.shape[0]}")
        self._check_size(x.shape[2:])
        emb, hs, h = self._encode(x, timesteps, y)
        for block in self.output_blocks:
            h = block(th.cat([h, hs.pop()], dim=1), emb)
        return self.out(h.type(x.dtype))


class SuperResModel(UNetModel):
    """A UNet that upsamples: it sees a low-resolution image, enlarged, beside x_t.

    `image_size` is that of the output. The input convolution takes 2 * in_channels.
    """

    def __init__(self, image_size, in_channels, *args, **kwargs):
        super().__init__(image_size, in_channels * 2, *args, **kwargs)

    def forward(self, x, timesteps, low_res=None, **kwargs):
        """As UNetModel.forward, with low_res [N, in_channels, ...] of any smaller size."""
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[self.dims]
        upsampled = F.interpolate(low_res, x.shape[2:], mode=mode)
        return super().forward(th.cat([x, upsampled], dim=1), timesteps, **kwargs)


class EncoderUNetModel(_Encoder):
    """The noisy-image classifier: the UNet's encoder and a pooling head.

    The arguments are UNetModel's; out_channels is the number of classes.

    :param pool: "adaptive" (average pooling), "attention", or "spatial" and "spatial_v2" (an MLP on the spatial means
        of all blocks, the second with a group norm).
    """

    num_classes = None  # no label embedding: a classifier is to find the label

    def __init__(
        self,
        image_size,
        in_channels,
        model_channels,
        out_channels,
        num_res_blocks,
        attention_resolutions,
        dropout=0,
        channel_mult=(1, 2, 4, 8),
        conv_resample=True,
        dims=2,
        use_checkpoint=False,
        use_fp16=False,
        num_heads=1,
        num_head_channels=-1,
        num_heads_upsample=-1,
        use_scale_shift_norm=False,
        resblock_updown=False,
        use_new_attention_order=False,
        pool="adaptive",
        use_bf16=False,
    ):
        super().__init__(locals())
        heads = {
            "adaptive": self._adaptive_head,
            "attention": self._attention_head,
            "spatial": self._spatial_head,
            "spatial_v2": self._spatial_v2_head,
        }
        self.out = choose("pooling (classifier_pool)", pool, heads)()

    def _adaptive_head(self):
        ch = self._skip_widths[-1]
        return NormFirst(
            normalization(ch),
            SiLU(),
            adaptive_avg_pool_nd(self.dims, 1),
            zero_module(conv_nd(self.dims, ch, self.out_channels, 1)),
            nn.Flatten(),
        )

    def _attention_head(self):
        ch = self._skip_widths[-1]
        if self.num_head_channels == -1 or self.dims != 2 or not isinstance(self.image_size, int):
            raise InputError("attention pooling needs num_head_channels, and square 2D images of a known image_size")
        self._check_size([self.image_size])
        pool = AttentionPool2d(self.image_size // self._encoder_ds, ch, self.num_head_channels, self.out_channels)
        return NormFirst(normalization(ch), SiLU(), pool)

    def _spatial_head(self):
        return nn.Sequential(nn.Linear(self._feature_size, 2048), nn.ReLU(), nn.Linear(2048, self.out_channels))

    def _spatial_v2_head(self):
        return nn.Sequential(
            nn.Linear(self._feature_size, 2048), normalization(2048), SiLU(), nn.Linear(2048, self.out_channels)
        )

    def forward(self, x, timesteps):
        """Apply the model.

        :param x: [N, in_channels, ...] float32.
        :param timesteps: [N], may be fractional.
        :return: logits [N, out_channels].
        """
        _, hs, h = self._encode(x, timesteps)
        if self.pool.startswith("spatial"):
            # The float32 means are [N, channels of all blocks].
            h = th.cat([f.type(x.dtype).flatten(2).mean(dim=2) for f in hs + [h]], dim=1)
        return self.out(h.type(x.dtype))
