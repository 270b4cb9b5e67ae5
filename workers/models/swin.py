"""Swin Transformer, the backbone of BiRefNet, for inference (Liu et al., "Swin Transformer: Hierarchical Vision
Transformer using Shifted Windows", ICCV 2021). Features stay (N, H, W, C); names as in the checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

PATCH = 4
"""Side in pixels of the square that becomes one token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwinSize:
    """`width`: channels of the first stage, doubled at each further one. `window`: side of an attention window."""

    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int


SIZES: Mapping[str, SwinSize] = {
    "swin_v1_t": SwinSize(width=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24), window=7),
    "swin_v1_l": SwinSize(width=192, depths=(2, 2, 18, 2), heads=(6, 12, 24, 48), window=12),
}


class Swin(nn.Module):
    """`x`: (N, 3, H, W) normalised. Returns one (N, C, H', W') per stage, at 1/4, 1/8, ... of the input, normed."""

    def __init__(self, size: SwinSize) -> None:
        super().__init__()
        self.patch_embed = _PatchEmbed(size.width)
        widths = [size.width * 2**stage for stage in range(len(size.depths))]
        self.layers = nn.ModuleList(
            _Stage(width, depth=depth, heads=heads, window=size.window, merges=width != widths[-1])
            for width, depth, heads in zip(widths, size.depths, size.heads, strict=True)
        )
        for stage, width in enumerate(widths):
            self.add_module(f"norm{stage}", nn.LayerNorm(width))

    def forward(self, x: Tensor) -> list[Tensor]:
        tokens = self.patch_embed(x)
        outputs = []
        for number, stage in enumerate(self.layers):
            features = stage(tokens)
            outputs.append(self.get_submodule(f"norm{number}")(features).permute(0, 3, 1, 2))
            if isinstance(stage.downsample, _PatchMerging):
                tokens = stage.downsample(features)
        return outputs


class _PatchEmbed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, stride=PATCH)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return tokens


class _Stage(nn.Module):
    def __init__(self, width: int, *, depth: int, heads: int, window: int, merges: bool) -> None:
        super().__init__()
        self.window = window
        self.blocks = nn.ModuleList(
            _Block(width, heads=heads, window=window, shift=window // 2 if number % 2 else 0) for number in range(depth)
        )
        self.downsample = _PatchMerging(width) if merges else None

    def forward(self, x: Tensor) -> Tensor:
        masked = _mask_windows(x.shape[1], x.shape[2], window=self.window, device=x.device)
        for block in self.blocks:
            x = block(x, masked)
        return x


class _Block(nn.Module):
    """Attention within windows, then a perceptron; every other block shifts the windows by half."""

    def __init__(self, width: int, *, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.window = window
        self.shift = shift
        self.norm1 = nn.LayerNorm(width)
        self.attn = _WindowAttention(width, heads=heads, window=window)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = _Perceptron(width)

    def forward(self, x: Tensor, masked: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        padded = functional.pad(self.norm1(x), (0, 0, 0, -width % self.window, 0, -height % self.window))
        if self.shift:
            padded = padded.roll((-self.shift, -self.shift), dims=(1, 2))
        windows = _to_windows(padded, self.window)
        attended = _from_windows(self.attn(windows, masked if self.shift else None), padded.shape, self.window)
        if self.shift:
            attended = attended.roll((self.shift, self.shift), dims=(1, 2))
        x = x + attended[:, :height, :width]
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class _WindowAttention(nn.Module):
    """Multi-head attention inside each window, with a learned bias by relative position."""

    relative_position_index: Tensor

    def __init__(self, width: int, *, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("relative_position_index", _relative_positions(window))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, masked: Tensor | None) -> Tensor:
        """`x`: (N, windows, tokens, C). `masked`: (windows, tokens, tokens), true for pairs without attention.

        Windows and heads become one dimension, so that all images share one mask.
        """
        count, windows, tokens, width = x.shape
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)[None]
        if masked is not None:
            bias = bias.masked_fill(masked[:, None], float("-inf"))
        bias = bias.expand(windows, -1, -1, -1).reshape(1, windows * self.heads, tokens, tokens)
        qkv = self.qkv(x).view(count, windows, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).reshape(3, count, windows * self.heads, tokens, -1)
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(count, -1, -1, -1))
        merged = attended.view(count, windows, self.heads, tokens, -1).transpose(2, 3).reshape(x.shape)
        out: Tensor = self.proj(merged)
        return out


class _Perceptron(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return out


class _PatchMerging(nn.Module):
    """Merges 2 x 2 tokens into one with twice the channels; pads an odd side with zeros."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        quarters = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        out: Tensor = self.reduction(self.norm(torch.cat(quarters, -1)))
        return out


def _to_windows(x: Tensor, window: int) -> Tensor:
    """Reshape (N, H, W, C) to (N, windows, window * window, C), windows row by row."""
    count, height, width, channels = x.shape
    x = x.view(count, height // window, window, width // window, window, channels).transpose(2, 3)
    return x.reshape(count, -1, window * window, channels)


def _from_windows(x: Tensor, shape: torch.Size, window: int) -> Tensor:
    count, height, width, channels = shape
    x = x.view(count, height // window, width // window, window, window, channels).transpose(2, 3)
    return x.reshape(shape)


def _mask_windows(height: int, width: int, *, window: int, device: torch.device) -> Tensor:
    """Return (windows, tokens, tokens) bool: pairs of tokens in a shifted window that come from opposite edges."""
    rows, columns = (_edge_bands(side + -side % window, window, device) for side in (height, width))
    bands = _to_windows((3 * rows[:, None] + columns)[None, ..., None], window)[0, ..., 0]
    return bands[:, :, None] != bands[:, None, :]


def _edge_bands(length: int, window: int, device: torch.device) -> Tensor:
    """Return 0 for every token but those of the last window: 1 before the border that the shift makes, 2 after it."""
    position = torch.arange(length, device=device)
    return (position >= length - window).long() + (position >= length - window // 2).long()


def _relative_positions(window: int) -> Tensor:
    """Return (tokens, tokens) int64: the row of the bias table for each pair of tokens."""
    position = torch.arange(window)
    rows, columns = (grid.flatten() for grid in torch.meshgrid(position, position, indexing="ij"))
    down = rows[:, None] - rows[None] + window - 1
    right = columns[:, None] - columns[None] + window - 1
    return down * (2 * window - 1) + right
