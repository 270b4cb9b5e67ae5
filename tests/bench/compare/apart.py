"""Why other tools' alpha is not ours: their steps around the same network, and each step in our form.

Only how an image is shrunk for the model and how its mask is enlarged again differs by more than rounding. rembg also
stretches image and mask to their full range, which by itself changes a photograph's mask by one grey level at most.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import transforms

from tests.bench.compare.recipe import MEAN, SIDE, STD, Model
from workers.imaging.resize import enlarge, shrink

Pixels = NDArray[np.uint8]
CARD = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
"""How the model card's script shrinks and enlarges: torchvision's default, and Pillow's."""
REMBG = (Image.Resampling.LANCZOS, Image.Resampling.LANCZOS)
OURS = (None, None)

_normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


@torch.inference_mode()
def alpha_by(photo: bytes, model: Model, filters: tuple[Image.Resampling | None, Image.Resampling | None]) -> Pixels:
    """(H, W). `filters`: for shrinking and for enlarging; None: ours."""
    shrinking, enlarging = filters
    image = Image.open(io.BytesIO(photo)).convert("RGB")
    if shrinking is None:
        small = shrink(np.array(image), (SIDE, SIDE))
    else:
        small = np.array(image.resize((SIDE, SIDE), shrinking))
    levels = model(_normalise(small).unsqueeze(0)).squeeze() * 255
    if enlarging is None:
        return enlarge(levels.round().to(torch.uint8).numpy(), (image.height, image.width))
    mask = levels.to(torch.uint8).numpy()  # the others cut off what we round
    return np.asarray(Image.fromarray(mask).resize(image.size, enlarging))


def grey_levels(one: NDArray[np.integer], other: NDArray[np.integer]) -> NDArray[np.int16]:
    """How far they are apart."""
    return np.abs(one.astype(np.int16) - other.astype(np.int16))
