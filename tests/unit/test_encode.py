"""PNG files that other programs must read: Pillow reads back the same pixels."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from workers.imaging.encode import encode_cutout_png, encode_mask_png


@pytest.mark.parametrize("shape", [(1, 1), (1, 9000), (700, 3), (513, 700)])
def test_a_cutout_reads_back_pixel_by_pixel(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(3)
    rgb = random.integers(0, 256, (*shape, 3), np.uint8)
    alpha = random.integers(-200, 256, shape).clip(0).astype(np.uint8)

    data = encode_cutout_png(rgb, alpha, text={"Software": "Cutfleet"})

    image = Image.open(io.BytesIO(data))
    image.load()
    pixels = np.asarray(image)
    assert image.mode == "RGBA"
    assert image.info["Software"] == "Cutfleet" and image.info["srgb"] == 0
    assert np.array_equal(pixels[..., 3], alpha)
    assert np.array_equal(pixels[..., :3], rgb * (alpha > 0)[..., None])


@pytest.mark.parametrize("shape", [(1, 1), (1, 9000), (700, 3), (1100, 1001)])
def test_a_mask_reads_back_pixel_by_pixel(shape: tuple[int, int]) -> None:
    mask = np.random.default_rng(4).integers(0, 256, shape, np.uint8)

    image = Image.open(io.BytesIO(encode_mask_png(mask)))

    assert image.mode == "L"
    assert np.array_equal(np.asarray(image), mask)


def test_the_stream_is_complete_and_its_checksums_match() -> None:
    data = encode_mask_png(np.zeros((5, 7), np.uint8))

    at = 8
    kinds = []
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert zlib.crc32(kind + body) == int.from_bytes(data[at + 8 + size : at + 12 + size], "big")
        if kind == b"IDAT":
            assert len(zlib.decompress(body)) == 5 * 8
        kinds.append(kind)
        at += 12 + size
    assert kinds == [b"IHDR", b"IDAT", b"IEND"]
