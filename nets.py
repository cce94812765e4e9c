"""The two networks: a residual MLP for points, a small UNet for images. Both are called as net(m, t, label=None).

    m      state, or a denoiser's c_in y: (B, in_dim) for the MLP, (B, c_in, H, W) for the UNet
    t      (B,), in [0, T]: process time, with the data at t_data, T = 1 for AGM and 0 for HOLD; or a denoiser's
           sigma / (1 + sigma), with the data at 0
    label  None or class numbers (B,), int64; only for a net built with classes > 0

Either returns one value per data dimension. The last layer starts at zero, so an untrained net predicts 0.
"""

import math

import torch
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention, silu


class TimeEmbedding(nn.Module):
    """Time and optional class -> (B, width). The time enters as u = log(|t - t_data| / T + 1e-6), in [-13.8, 0].

    Near the data u is log SNR up to a factor and a constant (-2u for a denoiser, -5u for AGM, -(2 order - 1) u for
    HOLD); near the prior, where little happens, it is smooth in t.
    """

    def __init__(self, width, T=1.0, t_data=1.0, classes=0):
        super().__init__()
        self.T, self.t_data, self.classes = T, t_data, classes
        self.register_buffer("freq", torch.logspace(math.log10(0.1), math.log10(4.0), 16), persistent=False)
        self.layers = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width) if classes else None  # the last row means "no class"

    def forward(self, t, label=None):
        u = torch.log((t - self.t_data).abs() / self.T + 1e-6)[:, None] * self.freq.to(t)  # (B, 16)
        e = self.layers(torch.cat([u.sin(), u.cos()], 1).to(self.layers[0].weight))  # (B, width)
        if self.label is not None:
            e = e + self.label(torch.full_like(t, self.classes, dtype=torch.long) if label is None else label)
        elif label is not None:
            raise ValueError("this net was built without classes and takes no label")
        return e


class MLP(nn.Module):
    """Residual MLP, time added at every layer. 20 x 128 (0.35M parameters) is what published 2-D studies use."""

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
    """UNet for images of any H, W: the input is zero-padded to a multiple of 2^(levels - 1) and the output cropped.

    width      channels of the first level; level l has width * mult[l] channels at size H / 2^l
    blocks     residual blocks a level (one more on the way up)
    attention  levels with self-attention; the innermost always has it
    """

    def __init__(
        self, c_in, c_out, width=64, mult=(1, 2), blocks=2, attention=(), dropout=0.0, T=1.0, t_data=1.0, classes=0
    ):
        super().__init__()
        if not mult or not set(attention) <= set(range(len(mult))):
            raise ValueError(f"attention names levels of mult, from 0; got {tuple(attention)} for mult {tuple(mult)}")
        self.factor = 2 ** (len(mult) - 1)
        self.time = TimeEmbedding(4 * width, T, t_data, classes)
        self.first = nn.Conv2d(c_in, width, 3, padding=1)

        def block(c, c_new, level):
            return Block(c, c_new, 4 * width, dropout, level in attention)

        self.down, self.up, skips, c = nn.ModuleList(), nn.ModuleList(), [width], width
        for level, factor in enumerate(mult):
            if level:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                skips.append(c)
            for _ in range(blocks):
                self.down.append(block(c, width * factor, level))
                c = width * factor
                skips.append(c)
        self.middle = nn.ModuleList([Block(c, c, 4 * width, dropout, True), Block(c, c, 4 * width, dropout, False)])
        for level, factor in reversed(list(enumerate(mult))):
            for _ in range(blocks + 1):
                self.up.append(block(c + skips.pop(), width * factor, level))
                c = width * factor
            if level:
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1)))
        self.last = nn.Sequential(norm(c), nn.SiLU(), zero(nn.Conv2d(c, c_out, 3, padding=1)))

    def forward(self, m, t, label=None):
        e = silu(self.time(t, label))  # (B, 4 width)
        H, W = m.shape[-2:]
        h = self.first(pad(m, (0, -W % self.factor, 0, -H % self.factor)))  # (B, width, H', W')
        skips = [h]
        for layer in self.down:
            h = layer(h, e) if isinstance(layer, Block) else layer(h)  # (B, width mult[l], H'/2^l, W'/2^l)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, e)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], 1), e) if isinstance(layer, Block) else layer(h)
        return self.last(h)[..., :H, :W]  # (B, c_out, H, W)


class Block(nn.Module):
    """Residual block: norm, SiLU, conv, scale and shift by the embedding, norm, SiLU, dropout, conv; then attention."""

    def __init__(self, c_in, c_out, c_emb, dropout, attention):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = norm(c_out), zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.emb = nn.Linear(c_emb, 2 * c_out)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out) if attention else nn.Identity()

    def forward(self, x, e):
        h = self.conv1(silu(self.norm1(x)))  # (B, c_out, H, W)
        scale, shift = self.emb(e)[:, :, None, None].chunk(2, 1)  # (B, c_out, 1, 1) each
        h = silu(self.norm2(h) * (1 + scale) + shift)
        return self.attention(self.skip(x) + self.conv2(self.dropout(h)))


class Attention(nn.Module):
    """Residual self-attention over the pixels, heads of about 64 channels."""

    def __init__(self, c):
        super().__init__()
        self.heads = next(heads for heads in range(max(c // 64, 1), 0, -1) if c % heads == 0)
        self.norm, self.qkv, self.out = norm(c), nn.Conv2d(c, 3 * c, 1), zero(nn.Conv2d(c, c, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W)
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # (B, heads, HW, C / heads) each
        h = scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(B, C, H, W)
        return x + self.out(h)


class Norm(nn.GroupNorm):
    """GroupNorm that computes in the dtype of its weights, whatever autocast made of x; the result has x's dtype."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def norm(c):
    """About 32 groups, at least 4 channels each."""
    groups = next(g for g in range(min(32, max(c // 4, 1)), 0, -1) if c % g == 0)
    return Norm(groups, c)


def zero(layer):
    """Starts a layer at zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
