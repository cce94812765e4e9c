"""The two networks: a residual MLP for points, a small UNet for images. Both are called as

    net(m, t, label=None) -> one value per dimension of the data

    m      what the network sees, the state or a denoiser's scaled y:
           (B, D) for the MLP, (B, channels, H, W) for the UNet
    t      (B,), from 0 to T: the time of the process, with the data at t_data (1 for AGM, 0 for
           HOLD); or a denoiser's sigma/(1 + sigma), with the data at 0
    label  None, or class numbers (B,), int64, for a net built with classes > 0

The last layer starts at zero, so an untrained net returns 0.
"""

import math

import torch
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention, silu


class TimeEmbedding(nn.Module):
    """Time and an optional class -> (B, width).

    The time enters as u = log(|t - t_data|/T + 1e-6), from -13.8 at the data to 0. Near the data u
    is log SNR up to a factor and a constant (-2 u for a denoiser, -5 u for AGM, -(2 n - 1) u for
    HOLD of order n). Near the prior, where little happens, it is smooth in t. Sines and cosines of
    16 frequencies, with periods of u from 63 down to 1.6, make it 32 numbers.
    """

    def __init__(self, width, T=1.0, t_data=1.0, classes=0):
        super().__init__()
        self.T = T
        self.t_data = t_data
        self.classes = classes
        frequencies = torch.logspace(math.log10(0.1), math.log10(4.0), 16)
        self.register_buffer("freq", frequencies, persistent=False)
        self.layers = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width) if classes else None  # the last: no class

    def forward(self, t, label=None):
        u = torch.log((t - self.t_data).abs() / self.T + 1e-6)
        angles = u[:, None] * self.freq.to(t)  # (B, 16)
        waves = torch.cat([angles.sin(), angles.cos()], 1)  # (B, 32)
        e = self.layers(waves.to(self.layers[0].weight))  # (B, width)
        if self.label is None and label is not None:
            raise ValueError("this net was built without classes and takes no label")
        if self.label is None:
            return e
        if label is None:
            label = torch.full_like(t, self.classes, dtype=torch.long)
        return e + self.label(label)


class MLP(nn.Module):
    """Residual MLP; the embedding of the time is added at every layer. 20 layers of 128 (0.35M
    parameters) are what published studies of 2-D data use."""

    def __init__(self, in_dim, out_dim, width=128, depth=20, T=1.0, t_data=1.0, classes=0):
        super().__init__()
        self.time = TimeEmbedding(width, T, t_data, classes)
        self.first = nn.Linear(in_dim, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.last = zero(nn.Linear(width, out_dim))

    def forward(self, m, t, label=None):
        e = self.time(t, label)  # (B, width)
        h = self.first(m)  # (B, width)
        for layer in self.layers:
            h = h + layer(silu(h + e))  # (B, width)
        return self.last(silu(h))  # (B, out_dim)


class UNet(nn.Module):
    """UNet for images of any H, W: the input is padded with zeros to a multiple of
    2^(levels - 1), the output cropped.

    in_channels, out_channels   of what it sees, and of the data
    width       channels of the first level; level l has width * mult[l] channels, at size H/2^l
    blocks      residual blocks a level (one more on the way up)
    attention   levels with self-attention, from 0; the innermost always has it
    ValueError for an attention level that mult does not have.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        width=64,
        mult=(1, 2),
        blocks=2,
        attention=(),
        dropout=0.0,
        T=1.0,
        t_data=1.0,
        classes=0,
    ):
        super().__init__()
        levels = range(len(mult))
        if not mult or not set(attention) <= set(levels):
            raise ValueError(
                f"attention names levels of mult, from 0; got {tuple(attention)} for mult {mult}"
            )
        self.factor = 2 ** (len(mult) - 1)
        self.time = TimeEmbedding(4 * width, T, t_data, classes)
        self.first = nn.Conv2d(in_channels, width, 3, padding=1)

        def block(c_in, level, attends):
            return Block(c_in, width * mult[level], 4 * width, dropout, attends)

        # Down: each level after the first starts by halving the size. c is the number of channels
        # at this point; `skips` keeps it for every output that the way up will see again.
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        c = width
        skips = [c]
        for level in levels:
            if level > 0:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                skips.append(c)
            for _ in range(blocks):
                self.down.append(block(c, level, level in attention))
                c = width * mult[level]
                skips.append(c)

        innermost = levels[-1]
        self.middle = nn.ModuleList([block(c, innermost, True), block(c, innermost, False)])

        # Up: each block sees the output of the block below and the newest skip. Each level but the
        # first ends by doubling the size.
        for level in reversed(levels):
            for _ in range(blocks + 1):
                self.up.append(block(c + skips.pop(), level, level in attention))
                c = width * mult[level]
            if level > 0:
                self.up.append(
                    nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1))
                )
        self.last = nn.Sequential(
            norm(c), nn.SiLU(), zero(nn.Conv2d(c, out_channels, 3, padding=1))
        )

    def forward(self, m, t, label=None):
        e = silu(self.time(t, label))  # (B, 4 width)
        H, W = m.shape[-2:]
        h = self.first(pad(m, (0, -W % self.factor, 0, -H % self.factor)))  # (B, width, H', W')
        skips = [h]
        for layer in self.down:
            h = layer(h, e) if isinstance(layer, Block) else layer(h)
            skips.append(h)  # (B, c, H'/2^l, W'/2^l)
        for layer in self.middle:
            h = layer(h, e)
        for layer in self.up:
            if isinstance(layer, Block):
                h = layer(torch.cat([h, skips.pop()], 1), e)
            else:
                h = layer(h)
        return self.last(h)[..., :H, :W]  # (B, out_channels, H, W)


class Block(nn.Module):
    """Residual block: norm, SiLU, convolution, scale and shift by the embedding, norm, SiLU,
    dropout, convolution; then attention."""

    def __init__(self, c_in, c_out, c_emb, dropout, attention):
        super().__init__()
        self.norm1 = norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = norm(c_out)
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.emb = nn.Linear(c_emb, 2 * c_out)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out) if attention else nn.Identity()

    def forward(self, x, e):
        h = self.conv1(silu(self.norm1(x)))  # (B, c_out, H, W)
        scale, shift = self.emb(e)[:, :, None, None].chunk(2, 1)  # (B, c_out, 1, 1) each
        h = silu(self.norm2(h) * (1 + scale) + shift)
        h = self.conv2(self.dropout(h))
        return self.attention(self.skip(x) + h)


class Attention(nn.Module):
    """Residual self-attention over the pixels; heads have about 64 channels each."""

    def __init__(self, c):
        super().__init__()
        self.heads = largest_divisor(c, max(c // 64, 1))
        self.norm = norm(c)
        self.qkv = nn.Conv2d(c, 3 * c, 1)
        self.out = zero(nn.Conv2d(c, c, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W)
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # (B, heads, HW, C/heads) each
        h = scaled_dot_product_attention(q, k, v)
        h = h.transpose(-1, -2).reshape(B, C, H, W)
        return x + self.out(h)


class Norm(nn.GroupNorm):
    """GroupNorm that computes in the dtype of its weights, whatever autocast made of x; the result
    has the dtype of x."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def norm(c):
    """At most 32 groups, of at least 4 channels each."""
    most = min(32, max(c // 4, 1))
    return Norm(largest_divisor(c, most), c)


def largest_divisor(number, most):
    """The largest divisor of a number that is at most `most`."""
    while number % most:
        most -= 1
    return most


def zero(layer):
    """A layer whose weights start at zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
