"""Draws and decodes sample images. Pillow and numpy are imported inside: most tests need neither."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from jobs.s3.client import Store
from tests.support.places import Places

if TYPE_CHECKING:
    from PIL import Image


def sample_image(*, seed: int = 0, size: tuple[int, int] = (160, 120), form: str = "JPEG") -> bytes:
    """Draw a bright disc on a noisy ground, which a model finds. `size`: width, height. `form`: Pillow's format."""
    import numpy as np
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(seed)
    width, height = size
    ground = Image.fromarray(rng.integers(20, 70, (height, width, 3), dtype=np.uint8))
    radius = min(size) // 3
    x, y = width // 2 + seed % 7 - 3, height // 2
    colour = (200 + seed % 50, 120, 40)
    ImageDraw.Draw(ground).ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    body = io.BytesIO()
    ground.save(body, form)
    return body.getvalue()


def put_images(store: Store, places: Places, count: int, *, start: int = 0) -> list[str]:
    """Upload `count` images; return their names below the source."""
    names = [f"p{number:05d}.jpg" for number in range(start, start + count)]
    for number, name in enumerate(names, start):
        store.put(places.key(name), sample_image(seed=number), content_type="image/jpeg")
    return names


def decode_image(body: bytes) -> Image.Image:
    from PIL import Image

    image = Image.open(io.BytesIO(body))
    image.load()
    return image
