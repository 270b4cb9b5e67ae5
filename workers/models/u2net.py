"""U-2-Net and the small U-2-Net-p for inference (Qin et al., "U2-Net: Going deeper with nested U-structure for salient
object detection", Pattern Recognition 2020). Batch norm is folded into the convolutions; names are the authors'.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

BATCH_NORM_EPSILON = 1e-5  # torch's default, used in the authors' training

_SMALL = {f"stage{name}": (64, 16, 64) for name in ("2", "3", "4", "5", "6")} | {
    "stage1": (3, 16, 64),
    **{f"stage{name}d": (128, 16, 64) for name in range(1, 6)},
}
_FULL = {
    "stage1": (3, 32, 64),
    "stage2": (64, 32, 128),
    "stage3": (128, 64, 256),
    "stage4": (256, 128, 512),
    "stage5": (512, 256, 512),
    "stage6": (512, 256, 512),
    "stage5d": (1024, 256, 512),
    "stage4d": (1024, 128, 256),
    "stage3d": (512, 64, 128),
    "stage2d": (256, 32, 64),
    "stage1d": (128, 16, 64),
}
CHANNELS = {"u2netp": _SMALL, "u2net": _FULL}
"""Input, middle and output channels of each stage (table 1 of the paper)."""

_DEPTH = {"1": 7, "2": 6, "3": 5, "4": 4}
_DILATIONS = (1, 2, 4, 8)


class U2Net(nn.Module):
    """`x`: (N, 3, H, W) normalised. Returns (N, 1, H, W) logits of the fused map. Trained at 320 x 320."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        channels = CHANNELS[variant]
        for name, (inside, middle, outside) in channels.items():
            depth = _DEPTH.get(name[5])
            block = _Block(inside, middle, outside, depth=depth) if depth else _DilatedBlock(inside, middle, outside)
            self.add_module(name, block)
        for scale, stage in enumerate(("1d", "2d", "3d", "4d", "5d", "6"), start=1):
            self.add_module(f"side{scale}", nn.Conv2d(channels[f"stage{stage}"][2], 1, 3, padding=1))
        self.outconv = nn.Conv2d(6, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        encoded = [self.get_submodule("stage1")(x)]
        for scale in range(2, 7):
            encoded.append(self.get_submodule(f"stage{scale}")(_halve(encoded[-1])))
        decoded = [encoded[5]]
        for scale in range(5, 0, -1):
            skip = encoded[scale - 1]
            joined = torch.cat((_resize_like(decoded[0], skip), skip), 1)
            decoded.insert(0, self.get_submodule(f"stage{scale}d")(joined))
        sides = [self.get_submodule(f"side{scale}")(decoded[scale - 1]) for scale in range(1, 7)]
        fused: Tensor = self.outconv(torch.cat([_resize_like(side, sides[0]) for side in sides], 1))
        return fused


class _Conv(nn.Module):
    """Convolution with its batch norm folded in, then ReLU (the authors' REBNCONV)."""

    def __init__(self, inside: int, outside: int, *, dilation: int) -> None:
        super().__init__()
        self.conv_s1 = nn.Conv2d(inside, outside, 3, padding=dilation, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.conv_s1(x))


class _Block(nn.Module):
    """A residual U of `depth` levels (RSU-7 to RSU-4): pooling between levels, dilation in the lowest."""

    def __init__(self, inside: int, middle: int, outside: int, *, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self.rebnconvin = _Conv(inside, outside, dilation=1)
        for level in range(1, depth + 1):
            dilation = 2 if level == depth else 1
            self.add_module(f"rebnconv{level}", _Conv(outside if level == 1 else middle, middle, dilation=dilation))
        for level in range(1, depth):
            self.add_module(f"rebnconv{level}d", _Conv(2 * middle, outside if level == 1 else middle, dilation=1))

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.rebnconvin(x)
        encoded = [self.get_submodule("rebnconv1")(residual)]
        for level in range(2, self.depth):
            encoded.append(self.get_submodule(f"rebnconv{level}")(_halve(encoded[-1])))
        decoded = self.get_submodule(f"rebnconv{self.depth}")(encoded[-1])
        for level in range(self.depth - 1, 0, -1):
            skip = encoded[level - 1]
            decoded = self.get_submodule(f"rebnconv{level}d")(torch.cat((_resize_like(decoded, skip), skip), 1))
        out: Tensor = residual + decoded
        return out


class _DilatedBlock(nn.Module):
    """RSU-4F: four levels at one resolution, with dilation instead of pooling."""

    def __init__(self, inside: int, middle: int, outside: int) -> None:
        super().__init__()
        self.rebnconvin = _Conv(inside, outside, dilation=1)
        for level, dilation in enumerate(_DILATIONS, start=1):
            self.add_module(f"rebnconv{level}", _Conv(outside if level == 1 else middle, middle, dilation=dilation))
        for level, dilation in enumerate(_DILATIONS[:-1], start=1):
            out = outside if level == 1 else middle
            self.add_module(f"rebnconv{level}d", _Conv(2 * middle, out, dilation=dilation))

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.rebnconvin(x)
        encoded = [self.get_submodule("rebnconv1")(residual)]
        for level in range(2, 5):
            encoded.append(self.get_submodule(f"rebnconv{level}")(encoded[-1]))
        decoded = encoded[-1]
        for level in range(3, 0, -1):
            decoded = self.get_submodule(f"rebnconv{level}d")(torch.cat((decoded, encoded[level - 1]), 1))
        out: Tensor = residual + decoded
        return out


def fold_batch_norm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fold each `bn_s1` of the authors' checkpoint into its `conv_s1`. A state without `bn_s1` does not change."""
    folded = {name: value for name, value in state.items() if ".bn_s1." not in name}
    for name in state:
        if not name.endswith(".bn_s1.weight"):
            continue
        block = name.removesuffix(".bn_s1.weight")
        norm = {leaf: state[f"{block}.bn_s1.{leaf}"] for leaf in ("weight", "bias", "running_mean", "running_var")}
        scale = norm["weight"] / torch.sqrt(norm["running_var"] + BATCH_NORM_EPSILON)
        folded[f"{block}.conv_s1.weight"] = state[f"{block}.conv_s1.weight"] * scale[:, None, None, None]
        folded[f"{block}.conv_s1.bias"] = (state[f"{block}.conv_s1.bias"] - norm["running_mean"]) * scale + norm["bias"]
    return folded


def _halve(x: Tensor) -> Tensor:
    return functional.max_pool2d(x, 2, stride=2, ceil_mode=True)


def _resize_like(x: Tensor, target: Tensor) -> Tensor:
    return functional.interpolate(x, size=target.shape[2:], mode="bilinear", align_corners=False)
