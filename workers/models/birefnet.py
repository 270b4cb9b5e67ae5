"""BiRefNet for inference (Zheng et al., "Bilateral Reference for High-Resolution Dichotomous Image Segmentation", CAAI
AIR 2024): RMBG-2.0 and the BiRefNet family. State dicts are those of the published checkpoints, including unused heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from jobs.catalogue import PatchOrder
from workers.models.swin import SIZES, Swin

MULTIPLE = 32
"""Both sides of the input must be a multiple of this: the deepest features are at 1/32."""

_INNER = 64  # channels inside every decoder block
_BRANCH = 256  # channels of each branch of the deformable pyramid
_GRADIENT = 16  # channels of the gradient attention


class BiRefNet(nn.Module):
    """`x`: (N, 3, H, W) normalised, H and W multiples of 32. Returns (N, 1, H, W) logits.

    `backbone`: a name of `SIZES`. `patch_order`: how the decoder cuts `x` into patches; keys and shapes don't show it.
    """

    def __init__(self, backbone: str, patch_order: PatchOrder) -> None:
        super().__init__()
        size = SIZES[backbone]
        self.bb = Swin(size)
        channels = [2 * size.width * 2**stage for stage in range(4)]
        self.squeeze_module = nn.Sequential(_DecoderBlock(sum(channels), channels[3]))
        self.decoder = _Decoder(channels, patch_order)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % MULTIPLE or x.shape[3] % MULTIPLE:
            raise ValueError(f"Both sides must be multiples of {MULTIPLE}, not {x.shape[2]} x {x.shape[3]}.")
        half = functional.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=True)
        whole = zip(self.bb(x), self.bb(half), strict=True)
        features = [torch.cat((full, _resize(small, full)), 1) for full, small in whole]
        deepest = torch.cat([_resize(feature, features[3]) for feature in features], 1)
        logits: Tensor = self.decoder(x, [*features[:3], self.squeeze_module(deepest)])
        return logits


class _Decoder(nn.Module):
    """Upsamples the deepest features; each scale adds the backbone's features and patches of the image itself."""

    def __init__(self, channels: list[int], patch_order: PatchOrder) -> None:
        super().__init__()
        self.patch_order = patch_order
        injected = [channels[3] // 8, *(width // 8 for width in reversed(channels))]
        for scale, width in zip((5, 4, 3, 2, 1), injected, strict=True):
            patches = 4**scale if scale > 1 else 1
            self.add_module(f"ipt_blk{scale}", _ImageBlock(3 * patches, width))
        for scale, width in zip((4, 3, 2, 1), injected, strict=False):
            inside = channels[scale - 1]
            self.add_module(f"decoder_block{scale}", _DecoderBlock(inside + width, inside // 2))
        self.conv_out1 = nn.Sequential(nn.Conv2d(channels[0] // 2 + injected[4], 1, 1))
        for scale in (4, 3, 2):
            width = channels[scale - 2]
            self.add_module(f"lateral_block{scale}", _Lateral(width))
            self.add_module(f"gdt_convs_{scale}", _gradient_features(width))
            self.add_module(f"gdt_convs_attn_{scale}", nn.Sequential(nn.Conv2d(_GRADIENT, 1, 1)))
            self.add_module(f"conv_ms_spvn_{scale}", nn.Conv2d(width, 1, 1))
            self.add_module(f"gdt_convs_pred_{scale}", nn.Sequential(nn.Conv2d(_GRADIENT, 1, 1)))

    def forward(self, x: Tensor, features: list[Tensor]) -> Tensor:
        """`features`: of the backbone at 1/4, 1/8 and 1/16, and the squeezed ones at 1/32."""
        decoded = features[3]
        for scale in (4, 3, 2):
            decoded = self._decode(x, decoded, scale)
            attention = self.get_submodule(f"gdt_convs_{scale}")(decoded)
            decoded = decoded * self.get_submodule(f"gdt_convs_attn_{scale}")(attention).sigmoid()
            lateral = features[scale - 2]
            decoded = _resize(decoded, lateral) + self.get_submodule(f"lateral_block{scale}")(lateral)
        return self.apply_head(x, self._decode(x, decoded, 1))

    def _decode(self, x: Tensor, decoded: Tensor, scale: int) -> Tensor:
        patches = cut_patches(x, decoded.shape[2], decoded.shape[3], order=self.patch_order)
        joined = torch.cat((decoded, self.get_submodule(f"ipt_blk{scale + 1}")(patches)), 1)
        out: Tensor = self.get_submodule(f"decoder_block{scale}")(joined)
        return out

    def apply_head(self, x: Tensor, decoded: Tensor) -> Tensor:
        """Apply the 1 x 1 head before upsampling, with which it commutes, and fold it into the convolution before it.
        The sums are the same as for all channels at full size, which would take a gigabyte.
        """
        head: nn.Conv2d = self.conv_out1[0]  # type: ignore[assignment]  # Sequential gives Module
        image: _ImageBlock = self.ipt_blk1  # type: ignore[assignment]  # added by name
        inside = decoded.shape[1]
        of_decoded, of_image = head.weight[:, :inside], head.weight[:, inside:]
        low = functional.conv2d(decoded, of_decoded, head.bias)
        return _resize(low, x) + image.project(x, of_image)


class _ImageBlock(nn.Module):
    """Two convolutions without an activation between them, on patches of the image."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, _INNER, 3, padding=1)
        self.conv_out = nn.Conv2d(_INNER, outside, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv_out(self.conv1(x))
        return out

    def project(self, x: Tensor, head: Tensor) -> Tensor:
        """Apply `forward` and the 1 x 1 convolution `head` (1, outside, 1, 1) as one convolution to one channel."""
        weight = torch.einsum("o,oikl->ikl", head.flatten(), self.conv_out.weight)[None]
        bias = None if self.conv_out.bias is None else (head.flatten() @ self.conv_out.bias)[None]
        return functional.conv2d(self.conv1(x), weight, bias, padding=1)


class _DecoderBlock(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(inside, _INNER, 3, padding=1)
        self.bn_in = nn.BatchNorm2d(_INNER)
        self.dec_att = _DeformablePyramid()
        self.conv_out = nn.Conv2d(_INNER, outside, 3, padding=1)
        self.bn_out = nn.BatchNorm2d(outside)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dec_att(functional.relu(self.bn_in(self.conv_in(x))))
        out: Tensor = self.bn_out(self.conv_out(x))
        return out


class _DeformablePyramid(nn.Module):
    """Deformable convolutions of several kernel sizes, joined with the mean of the whole image (deformable ASPP)."""

    def __init__(self) -> None:
        super().__init__()
        self.aspp1 = _DeformableBranch(1)
        self.aspp_deforms = nn.ModuleList(_DeformableBranch(kernel) for kernel in (1, 3, 7))
        self.global_avg_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(_INNER, _BRANCH, 1, bias=False), nn.BatchNorm2d(_BRANCH), nn.ReLU()
        )
        self.conv1 = nn.Conv2d(5 * _BRANCH, _INNER, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_INNER)

    def forward(self, x: Tensor) -> Tensor:
        branches = [branch(x) for branch in (self.aspp1, *self.aspp_deforms)]
        mean = self.global_avg_pool(x).expand(-1, -1, *x.shape[2:])
        return functional.relu(self.bn1(self.conv1(torch.cat((*branches, mean), 1))))


class _DeformableBranch(nn.Module):
    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.atrous_conv = DeformableConv(kernel)
        self.bn = nn.BatchNorm2d(_BRANCH)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.atrous_conv(x)))


class DeformableConv(nn.Module):
    """A convolution that samples at the offsets of `offset_conv`, each tap weighted by `modulator_conv` (0 to 2)."""

    def __init__(self, kernel: int) -> None:
        from torchvision.ops import deform_conv2d  # here: it imports torch's compiler, seconds that u2net does not need

        super().__init__()
        self._deform = deform_conv2d
        taps, padding = kernel * kernel, kernel // 2
        self.offset_conv = nn.Conv2d(_INNER, 2 * taps, kernel, padding=padding)
        self.modulator_conv = nn.Conv2d(_INNER, taps, kernel, padding=padding)
        self.regular_conv = nn.Conv2d(_INNER, _BRANCH, kernel, padding=padding, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute bfloat16 in float32: `deform_conv2d` has no kernel for it, and float16 has a smaller range."""
        exact = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
        out: Tensor = self._deform(
            x.to(exact),
            self.offset_conv(x).to(exact),
            self.regular_conv.weight.to(exact),
            padding=self.regular_conv.padding,
            mask=(2 * self.modulator_conv(x).sigmoid()).to(exact),
        )
        return out.to(x.dtype)


class _Lateral(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


def _gradient_features(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, _GRADIENT, 3, padding=1), nn.BatchNorm2d(_GRADIENT), nn.ReLU())


def cut_patches(x: Tensor, height: int, width: int, *, order: PatchOrder) -> Tensor:
    """Cut `x` (N, C, H, W) into patches, stacked as channels: (N, C * patches, height, width)."""
    count, channels, full_height, full_width = x.shape
    grid = x.view(count, channels, full_height // height, height, full_width // width, width)
    axes = (0, 4, 2, 1, 3, 5) if order == "columns_first" else (0, 1, 2, 4, 3, 5)
    return grid.permute(axes).reshape(count, -1, height, width)


def _resize(x: Tensor, target: Tensor) -> Tensor:
    return functional.interpolate(x, size=target.shape[2:], mode="bilinear", align_corners=True)
