"""Why the alpha of other tools differs from ours: their steps around the same network, each also in our form.

Only the resizing of image and mask differs by more than rounding. rembg also stretches image and mask to their full
range, which changes a photograph's mask by at most one grey level.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import transforms

from tests.bench.compare.recipe import MEAN, SIDE, STD, Model
from workers.imaging.pixels import Pixels
from workers.imaging.resize import enlarge, shrink

CARD = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
"""Resizing filters of the model card's script: the defaults of torchvision and Pillow."""
REMBG = (Image.Resampling.LANCZOS, Image.Resampling.LANCZOS)
OURS = (None, None)

_normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


@torch.inference_mode()
def compute_alpha(
    photo: bytes, model: Model, filters: tuple[Image.Resampling | None, Image.Resampling | None]
) -> Pixels:
    """Return alpha (H, W). `filters`: for shrinking and for enlarging; None: ours."""
    shrinking, enlarging = filters
    image = Image.open(io.BytesIO(photo)).convert("RGB")
    if shrinking is None:
        small = shrink(np.array(image), (SIDE, SIDE))
    else:
        small = np.array(image.resize((SIDE, SIDE), shrinking))
    levels = model(_normalise(small).unsqueeze(0)).squeeze() * 255
    if enlarging is None:
        return enlarge(levels.round().to(torch.uint8).numpy(), (image.height, image.width))
    mask = levels.to(torch.uint8).numpy()  # the other tools truncate where we round
    return np.asarray(Image.fromarray(mask).resize(image.size, enlarging))


def difference(one: Pixels, other: Pixels) -> NDArray[np.int16]:
    """Return the absolute difference in grey levels."""
    return np.abs(one.astype(np.int16) - other.astype(np.int16))
