"""The networks of ADM: a UNet with attention at several resolutions, its encoder as a classifier, and an upsampler.

The released checkpoints determine the names and order of the parameters. Optimizer states and seeded initial values
also depend on the order in which the layers are created.

Contents: resampling layers, ResBlock, AttentionBlock and its attention functions, the encoder that all networks share,
UNetModel, SuperResModel, EncoderUNetModel.
"""

import math
from abc import abstractmethod
from functools import partial

import torch as th
import torch.nn as nn
import torch.nn.functional as F

from .errors import InputError, choose
from .nn import (
    SiLU,
    adaptive_avg_pool_nd,
    as_weights_of,
    avg_pool_nd,
    checkpoint,
    conv_nd,
    convert_convs,
    linear,
    normalization,
    timestep_embedding,
    zero_module,
)

POOLS = ("adaptive", "attention", "spatial", "spatial_v2")  # the pooling types of EncoderUNetModel


class TimestepBlock(nn.Module):
    """A module whose `forward(x, emb)` also takes the embedding of the timestep, and perhaps of the class."""

    @abstractmethod
    def forward(self, x, emb):
        """Apply the module to x [N, C, ...] given emb [N, emb_channels]."""


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """A sequence that passes the embedding to the children that are TimestepBlocks."""

    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by two, followed by a convolution if `use_conv`. The first axis of 3D data is kept.

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
        x = F.interpolate(x, scale_factor=(1, 2, 2) if self.dims == 3 else 2, mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """Downsampling by two, by a strided convolution or an average pool. The first axis of 3D data is kept.

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
    """A residual block conditioned on the embedding. It can also resample.

    [N, channels, ...], [N, emb_channels] -> [N, out_channels, ...]

    :param channels: the number of input channels.
    :param emb_channels: the width of the embedding.
    :param dropout: the dropout rate.
    :param out_channels: the number of output channels. The default is the number of input channels.
    :param use_conv: use a 3x3 convolution instead of a 1x1 convolution in a skip connection that changes the channels.
    :param use_scale_shift_norm: use adaptive group norm (ADM, section 3.1): the embedding scales and shifts the output
        of the second norm. Otherwise the embedding is added to the input of the second norm.
    :param use_checkpoint: recompute the activations of the block in the backward pass instead of keeping them.
    :param up, down: upsample or downsample both branches by two.
    """

    def __init__(
        self, channels, emb_channels, dropout, out_channels=None, use_conv=False, use_scale_shift_norm=False, dims=2,
        use_checkpoint=False, up=False, down=False,
    ):  # fmt: skip
        super().__init__()
        self.channels = channels
        self.emb_channels = emb_channels
        self.dropout = dropout
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm

        self.in_layers = nn.Sequential(
            normalization(channels), SiLU(), conv_nd(dims, channels, self.out_channels, 3, padding=1)
        )
        self.updown = up or down
        if up:
            self.h_upd, self.x_upd = Upsample(channels, False, dims), Upsample(channels, False, dims)
        elif down:
            self.h_upd, self.x_upd = Downsample(channels, False, dims), Downsample(channels, False, dims)
        else:
            self.h_upd = self.x_upd = nn.Identity()
        self.emb_layers = nn.Sequential(
            SiLU(), linear(emb_channels, 2 * self.out_channels if use_scale_shift_norm else self.out_channels)
        )
        self.out_layers = nn.Sequential(
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
        if self.updown:
            h = self.in_layers[:-1](x)  # norm, SiLU
            h = self.in_layers[-1](self.h_upd(h))
            x = self.x_upd(x)
        else:
            h = self.in_layers(x)
        emb = self.emb_layers(emb).type(h.dtype)
        emb = emb.reshape(*emb.shape, *[1] * (h.ndim - 2))  # [N, C] -> [N, C, 1, 1]
        if self.use_scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
            h = self.out_layers[1:](h)
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(x) + h


class AttentionBlock(nn.Module):
    """Residual self-attention between all positions of [N, channels, ...].

    :param num_heads: the number of heads. Ignored if `num_head_channels` gives the width of a head.
    :param use_checkpoint: recompute the activations of the block in the backward pass instead of keeping them.
    :param use_new_attention_order: use the channel layout of QKVAttention instead of that of QKVAttentionLegacy.
    """

    def __init__(
        self, channels, num_heads=1, num_head_channels=-1, use_checkpoint=False, use_new_attention_order=False
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
        h = self.norm(x).flatten(2)  # [N, C, T]
        h = self.proj_out(self.attention(self.qkv(h)))
        return x + h.reshape(x.shape)


def count_heads(channels, num_heads, num_head_channels):
    """Return the number of attention heads: channels / num_head_channels, or num_heads if num_head_channels is -1."""
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


def count_flops_attn(model, _x, y):
    """Count the operations of an attention module for `thop`: two matrix products of T x T x C per sample."""
    n, c, *spatial = y[0].shape
    model.total_ops += th.DoubleTensor([2 * n * math.prod(spatial) ** 2 * c])


class QKVAttention(nn.Module):
    """Attention for channels in the order: queries of all heads, keys of all heads, values of all heads.

    [N, 3 * n_heads * C, T] -> [N, n_heads * C, T]
    """

    def __init__(self, n_heads):
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv):
        n, width, length = qkv.shape
        qkv = qkv.transpose(1, 2).contiguous().view(n, length, 3, self.n_heads, width // (3 * self.n_heads))
        return attend(*qkv.unbind(2))

    count_flops = staticmethod(count_flops_attn)


class QKVAttentionLegacy(nn.Module):
    """Attention for channels in the order: queries, keys and values of the first head, then of the second head, ...

    [N, n_heads * 3 * C, T] -> [N, n_heads * C, T]
    """

    def __init__(self, n_heads):
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv):
        n, width, length = qkv.shape
        qkv = qkv.transpose(1, 2).contiguous().view(n, length, self.n_heads, 3, width // (3 * self.n_heads))
        return attend(*qkv.unbind(3))

    count_flops = staticmethod(count_flops_attn)


def attend(q, k, v):
    """Scaled dot-product attention: q, k, v [N, T, heads, C] -> [N, heads * C, T].

    The channels of a head must be contiguous in memory for the fused kernels.
    """
    h = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # [N, heads, T, C]
    return h.transpose(1, 2).flatten(2).transpose(1, 2)


class AttentionPool2d(nn.Module):
    """Attention pooling as in CLIP. The query is the mean over all positions. [N, embed_dim, S, S] -> [N, output_dim].

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
            raise InputError(f"attention pooling was built for {positions} positions but got {x.shape[2]}")
        x = th.cat([x.mean(dim=-1, keepdim=True), x], dim=-1)  # [N, C, 1 + S*S]
        x = x + self.positional_embedding.to(x.dtype)
        return self.c_proj(self.attention(self.qkv_proj(x)))[:, :, 0]


class _Encoder(nn.Module):
    """The layers that UNetModel and EncoderUNetModel share: time_embed, input_blocks and middle_block.

    The encoder is a base class and not a submodule, because a submodule would change the parameter names of the
    released checkpoints. UNetModel documents the arguments.
    """

    TORSO = ("input_blocks", "middle_block")  # converted to half precision

    def __init__(
        self, image_size, in_channels, model_channels, out_channels, num_res_blocks, attention_resolutions, dropout=0,
        channel_mult=(1, 2, 4, 8), conv_resample=True, dims=2, num_classes=None, use_checkpoint=False, use_fp16=False,
        num_heads=1, num_head_channels=-1, num_heads_upsample=-1, use_scale_shift_norm=False, resblock_updown=False,
        use_new_attention_order=False, use_bf16=False,
    ):  # fmt: skip
        super().__init__()
        if use_fp16 and use_bf16:
            raise InputError("use_fp16 and use_bf16 exclude each other: choose one")
        if num_res_blocks < 1 or not 0 <= dropout <= 1:
            raise InputError(f"num_res_blocks {num_res_blocks} must be at least 1, and dropout {dropout} from 0 to 1")
        if not channel_mult or int(min(channel_mult) * model_channels) < 1:
            raise InputError(
                f"num_channels {model_channels} with channel_mult {tuple(channel_mult)}: there must be a level, and "
                f"each needs a width of at least 1"
            )
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, out_channels
        self.model_channels, self.channel_mult, self.num_res_blocks = model_channels, channel_mult, num_res_blocks
        self.dims, self.dropout, self.num_classes, self.use_checkpoint = dims, dropout, num_classes, use_checkpoint
        self.conv_resample, self.resblock_updown = conv_resample, resblock_updown
        self.attention_resolutions, self.num_heads = attention_resolutions, num_heads
        self.num_heads_upsample = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.num_head_channels = num_head_channels
        self.dtype = th.float16 if use_fp16 else th.bfloat16 if use_bf16 else th.float32

        self.emb_channels = 4 * model_channels
        self._res_block = partial(
            ResBlock,
            emb_channels=self.emb_channels,
            dropout=dropout,
            dims=dims,
            use_checkpoint=use_checkpoint,
            use_scale_shift_norm=use_scale_shift_norm,
        )
        self._attention_block = partial(
            AttentionBlock,
            num_head_channels=num_head_channels,
            use_checkpoint=use_checkpoint,
            use_new_attention_order=use_new_attention_order,
        )
        self.time_embed = nn.Sequential(
            linear(model_channels, self.emb_channels), SiLU(), linear(self.emb_channels, self.emb_channels)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, self.emb_channels)
        self._build_encoder()
        self._build_decoder()

    def _build_encoder(self):
        """Create input_blocks and middle_block, and record the width after each input block."""
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
                    down = self._res_block(ch, out_channels=ch, down=True)
                else:
                    down = Downsample(ch, self.conv_resample, dims=self.dims, out_channels=ch)
                self.input_blocks.append(TimestepEmbedSequential(down))
                widths.append(ch)
                ds *= 2
        self.middle_block = TimestepEmbedSequential(
            self._res_block(ch, out_channels=ch),
            self._attention_block(ch, num_heads=self.num_heads),
            self._res_block(ch, out_channels=ch),
        )
        self._skip_widths = widths
        self._feature_size = sum(widths) + ch
        self._encoder_ds = ds

    def _build_decoder(self):
        """Create output_blocks and the output layers. The classifier does not override this method."""

    def _level_block(self, ch, out_ch, ds, num_heads):
        """Create a residual block, and attention if attention_resolutions contains the downsampling factor ds."""
        layers = [self._res_block(ch, out_channels=out_ch)]
        if ds in self.attention_resolutions:
            layers.append(self._attention_block(out_ch, num_heads=num_heads))
        return TimestepEmbedSequential(*layers)

    def _check_size(self, sizes):
        """Raise InputError for an image size that is not divisible by the total downsampling factor."""
        sizes = sizes[-2:]  # the first axis of 3D data is not resampled
        halvings = len(self.channel_mult) - 1
        if any(size < 1 or size % 2**halvings for size in sizes):
            raise InputError(
                f"an image size of {'x'.join(map(str, sizes))} cannot be halved {halvings} times: the "
                f"{len(self.channel_mult)} levels of channel_mult {tuple(self.channel_mult)} need a multiple of "
                f"{2**halvings}"
            )

    def _convert(self, dtype):
        for name in self.TORSO:
            convert_convs(self.get_submodule(name), dtype)
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
        """Run the encoder. Return the embedding, the outputs of all input blocks, and that of the middle block."""
        emb = timestep_embedding(timesteps, self.model_channels)  # [N, model_channels], or [1, ...] for all samples
        emb = self.time_embed(as_weights_of(self.time_embed, emb))
        if y is not None:
            emb = emb + self.label_emb(y)
        h = as_weights_of(self.input_blocks, x, self.dtype)
        hs = []
        for block in self.input_blocks:
            h = block(h, emb)
            hs.append(h)
        return emb, hs, self.middle_block(h, emb)

    def _output(self, h, dtype):
        """Run the output layers, in the dtype of their weights."""
        return self.out(as_weights_of(self.out, h, dtype)).type(dtype)


class UNetModel(_Encoder):
    """The UNet of the diffusion model.

    :param image_size: the side of the images, or (height, width), which must fit the number of levels; None is not
        checked.
    :param in_channels: the number of input channels.
    :param model_channels: the base width, which is multiplied by channel_mult.
    :param out_channels: the number of output channels.
    :param num_res_blocks: the number of residual blocks per level of the encoder. Each level of the decoder has one
        more.
    :param attention_resolutions: the downsampling factors with attention. For example, {4} is attention at a quarter of
        the resolution of the images.
    :param dropout: the dropout rate.
    :param channel_mult: the width of each level, as a multiple of model_channels; fractions are allowed.
    :param conv_resample: resample with learned convolutions. Ignored if resblock_updown is set.
    :param dims: 1, 2 or 3, for sequences, images or videos. The first axis of a video keeps its length.
    :param num_classes: the number of classes of a class-conditional model, or None for an unconditional model.
    :param use_checkpoint: save memory in training by recomputing activations in the backward pass.
    :param use_fp16, use_bf16: the precision of the torso. After loading weights, call convert_to_fp16() or
        convert_to_bf16().
    :param num_heads: the number of heads of each attention block. Ignored if num_head_channels gives their width.
    :param num_heads_upsample: the number of heads in the decoder; -1 for num_heads.
    :param use_scale_shift_norm: use adaptive group norm; see ResBlock.
    :param resblock_updown: resample inside residual blocks, as BigGAN does.
    :param use_new_attention_order: see AttentionBlock.
    :raises InputError: for arguments that cannot be combined.
    """

    TORSO = ("input_blocks", "middle_block", "output_blocks")

    def _build_decoder(self):
        if self.image_size is not None:
            self._check_size(self.image_size if isinstance(self.image_size, (tuple, list)) else [self.image_size])
        skip_widths = list(self._skip_widths)
        ch, ds = skip_widths[-1], self._encoder_ds
        self.output_blocks = nn.ModuleList([])
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            out_ch = int(mult * self.model_channels)
            for i in range(self.num_res_blocks + 1):
                block = self._level_block(ch + skip_widths.pop(), out_ch, ds, self.num_heads_upsample)
                ch = out_ch
                if level and i == self.num_res_blocks:
                    if self.resblock_updown:
                        block.append(self._res_block(ch, out_channels=ch, up=True))
                    else:
                        block.append(Upsample(ch, self.conv_resample, dims=self.dims, out_channels=ch))
                    ds //= 2
                self.output_blocks.append(block)
        self.out = nn.Sequential(
            normalization(ch), SiLU(), zero_module(conv_nd(self.dims, ch, self.out_channels, 3, padding=1))
        )

    def forward(self, x, timesteps, y=None):
        """Apply the model.

        :param x: [N, in_channels, ...] floats.
        :param timesteps: [N], or [1] for all samples; integers or floats.
        :param y: labels [N] int64 for a class-conditional model; None for an unconditional model.
        :return: [N, out_channels, ...] in x's dtype.
        """
        if (y is not None) != (self.num_classes is not None):
            raise ValueError("pass labels y to a class-conditional model, and to no other")
        if y is not None and y.shape != x.shape[:1]:
            raise ValueError(f"labels of shape {tuple(y.shape)} for a batch of {x.shape[0]}")
        self._check_size(x.shape[2:])
        emb, hs, h = self._encode(x, timesteps, y)
        for block in self.output_blocks:
            h = block(th.cat([h, hs.pop()], dim=1), emb)
        return self._output(h, x.dtype)


class SuperResModel(UNetModel):
    """A UNet that upsamples images. Its input is the concatenation of x_t and the enlarged low-resolution image.

    `image_size` is the size of the large images. The input convolution takes 2 * in_channels channels.
    """

    def __init__(self, image_size, in_channels, *args, **kwargs):
        super().__init__(image_size, in_channels * 2, *args, **kwargs)

    def forward(self, x, timesteps, low_res=None, **kwargs):
        """Apply the model given low-resolution images low_res [N, in_channels, ...]; see UNetModel.forward."""
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[self.dims]
        upsampled = F.interpolate(low_res, x.shape[2:], mode=mode)
        return super().forward(th.cat([x, upsampled], dim=1), timesteps, **kwargs)


class EncoderUNetModel(_Encoder):
    """The noisy-image classifier: the encoder of the UNet with a pooling head.

    UNetModel documents the arguments. out_channels is the number of classes.

    :param pool: the pooling head: "adaptive" (average pooling), "attention", "spatial" (an MLP on the spatial means of
        all blocks), or "spatial_v2" (the MLP with a group norm).
    """

    def __init__(
        self, image_size, in_channels, model_channels, out_channels, num_res_blocks, attention_resolutions, dropout=0,
        channel_mult=(1, 2, 4, 8), conv_resample=True, dims=2, use_checkpoint=False, use_fp16=False, num_heads=1,
        num_head_channels=-1, num_heads_upsample=-1, use_scale_shift_norm=False, resblock_updown=False,
        use_new_attention_order=False, pool="adaptive", use_bf16=False,
    ):  # fmt: skip
        super().__init__(
            image_size, in_channels, model_channels, out_channels, num_res_blocks, attention_resolutions, dropout,
            channel_mult, conv_resample, dims, None, use_checkpoint, use_fp16, num_heads, num_head_channels,
            num_heads_upsample, use_scale_shift_norm, resblock_updown, use_new_attention_order, use_bf16,
        )  # fmt: skip
        choose("pooling (classifier_pool)", pool, dict.fromkeys(POOLS))
        self.pool = pool
        ch, features = self._skip_widths[-1], self._feature_size
        if pool == "adaptive":
            conv = zero_module(conv_nd(dims, ch, out_channels, 1))
            self.out = nn.Sequential(normalization(ch), SiLU(), adaptive_avg_pool_nd(dims, 1), conv, nn.Flatten())
        elif pool == "attention":
            if num_head_channels == -1 or dims != 2 or not isinstance(image_size, int):
                raise InputError("attention pooling needs num_head_channels, and square 2D images of known image_size")
            self._check_size([image_size])
            attention = AttentionPool2d(image_size // self._encoder_ds, ch, num_head_channels, out_channels)
            self.out = nn.Sequential(normalization(ch), SiLU(), attention)
        elif pool == "spatial":
            self.out = nn.Sequential(nn.Linear(features, 2048), nn.ReLU(), nn.Linear(2048, out_channels))
        else:
            norm = normalization(2048)
            self.out = nn.Sequential(nn.Linear(features, 2048), norm, SiLU(), nn.Linear(2048, out_channels))

    def forward(self, x, timesteps):
        """Apply the model.

        :param x: [N, in_channels, ...] floats.
        :param timesteps: [N], or [1] for all samples; integers or floats.
        :return: logits [N, out_channels] in x's dtype.
        """
        _, hs, h = self._encode(x, timesteps)
        if self.pool.startswith("spatial"):
            h = th.cat([f.type(x.dtype).flatten(2).mean(dim=2) for f in hs + [h]], dim=1)  # [N, channels of all blocks]
        return self._output(h, x.dtype)
