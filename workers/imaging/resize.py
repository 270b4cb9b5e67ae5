"""Shrink images and enlarge masks with Pillow's bilinear filter, in a fraction of Pillow's time."""

from __future__ import annotations

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from workers.imaging.pixels import Pixels


def shrink(rgb: Pixels, size: tuple[int, int]) -> Pixels:
    """Resize (H, W, 3) to `size` (height, width), antialiased bilinear. The aspect ratio is not kept: the models were
    trained that way.
    """
    return _resize(torch.from_numpy(rgb).permute(2, 0, 1), size).permute(1, 2, 0).contiguous().numpy()


def enlarge(mask: Pixels, size: tuple[int, int]) -> Pixels:
    """Resize (h, w) to `size` (height, width), bilinear; antialiased if a side of `size` is shorter than the mask's."""
    height, width = size
    if height >= mask.shape[0] and width >= mask.shape[1]:
        return np.asarray(cv2.resize(mask, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)
    return _resize(torch.from_numpy(mask)[None], size)[0].numpy()


def _resize(planes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """`planes`: (C, H, W) uint8. The batch stride is explicit: torch treats a batch of one as planar and repacks it
    (pytorch issue 68430).
    """
    channels, height, width = planes.shape
    batch = planes.as_strided((1, channels, height, width), (planes.numel(), *planes.stride()))
    return F.interpolate(batch, size=size, mode="bilinear", align_corners=False, antialias=True)[0]
