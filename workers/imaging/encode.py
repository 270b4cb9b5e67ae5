"""Encode PNG, JPEG and WebP, all sRGB. The PNG encoder works in bands of rows that fit the processor's cache:
interleave, zero the colour where alpha is 0, filter, deflate. It allocates no RGBA array of the image's size.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import cv2
import numpy as np
from isal import isal_zlib
from PIL import ExifTags, Image

from jobs.recipe import Rendition
from workers.imaging.colour import srgb_profile
from workers.imaging.pixels import Pixels

_BAND_BYTES = 1 << 20
"""A band and its filtered copy fit a core's level 2 cache; 0.5 to 2 MB are equally fast."""
_FILTER_UP = 2
"""PNG filter: each byte minus the one above. One subtraction for a band; at most 2 % larger than the best filter."""
_GREY, _RGB, _RGBA = 0, 2, 6
_INTENT_PERCEPTUAL = b"\0"
_EXIF_TAGS = {"artist": ExifTags.Base.Artist, "copyright": ExifTags.Base.Copyright}


def encode_cutout_png(rgb: Pixels, alpha: Pixels, *, text: Mapping[str, str]) -> bytes:
    """Encode RGBA with straight alpha; colour is zero where alpha is 0. `rgb`: (H, W, 3), `alpha`: (H, W). `text`:
    values by keyword, for the file's text chunks.
    """
    return _png(alpha.shape, _RGBA, _colour_chunks(text), _cutout_rows(rgb, alpha))


def encode_flat_png(rgb: Pixels, *, text: Mapping[str, str]) -> bytes:
    """Encode RGB. `rgb`: (H, W, 3)."""
    return _png(rgb.shape[:2], _RGB, _colour_chunks(text), _plain_rows(rgb.reshape(len(rgb), -1)))


def encode_mask_png(alpha: Pixels) -> bytes:
    """Encode 8-bit grey. `alpha`: (H, W)."""
    return _png(alpha.shape, _GREY, [], _plain_rows(alpha))


def encode_with_pillow(pixels: Pixels, rendition: Rendition, *, credit: tuple[tuple[str, str], ...]) -> bytes:
    """Encode JPEG or WebP. `pixels`: (H, W, 3), or (H, W, 4) for WebP. `credit`: artist and copyright, the only EXIF
    written. JPEG has no chroma subsampling: product edges are sharp and coloured.
    """
    exif = Image.Exif()
    for name, value in credit:
        exif[_EXIF_TAGS[name]] = value
    options: dict[str, Any] = {"quality": rendition.quality, "icc_profile": srgb_profile()}
    if credit:
        options["exif"] = exif
    if rendition.format == "jpeg":
        options["subsampling"] = "4:4:4"
    else:
        options |= {"lossless": rendition.lossless, "method": 0}
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, rendition.format, **options)
    return out.getvalue()


def _cutout_rows(rgb: Pixels, alpha: Pixels) -> Iterator[Pixels]:
    """Yield bands of filtered rows, (N, 1 + 4 W) each. A band is overwritten by the next one."""
    height, width = alpha.shape
    step = _band_rows(height, 4 * width)
    pixels = np.zeros((step + 1, width, 4), np.uint8)
    lines = pixels.reshape(step + 1, 4 * width)
    filtered = np.full((step, 1 + 4 * width), _FILTER_UP, np.uint8)
    for top in range(0, height, step):
        mask = alpha[top : top + step]
        count = len(mask)
        band = pixels[1 : count + 1]
        cv2.cvtColor(rgb[top : top + count], cv2.COLOR_RGB2RGBA, dst=band)
        band[..., 3] = mask
        packed = band.view(np.uint32)[..., 0]
        np.multiply(packed, mask > 0, out=packed)
        np.subtract(lines[1 : count + 1], lines[:count], out=filtered[:count, 1:])
        yield filtered[:count]
        lines[0] = lines[count]


def _plain_rows(lines: Pixels) -> Iterator[Pixels]:
    """Like `_cutout_rows`, for rows that need no interleaving. `lines`: (H, bytes of a row)."""
    height, size = lines.shape
    step = _band_rows(height, size)
    filtered = np.full((step, 1 + size), _FILTER_UP, np.uint8)
    above: Pixels = np.zeros((1, size), np.uint8)
    for top in range(0, height, step):
        band = lines[top : top + step]
        np.subtract(band[:1], above, out=filtered[:1, 1:])
        np.subtract(band[1:], band[:-1], out=filtered[1 : len(band), 1:])
        yield filtered[: len(band)]
        above = band[-1:]


def _band_rows(height: int, row_bytes: int) -> int:
    return min(height, max(1, _BAND_BYTES // row_bytes))


def _png(shape: tuple[int, ...], colour: int, chunks: list[bytes], rows: Iterator[Pixels]) -> bytes:
    """`shape`: (H, W). Source: PNG specification, third edition, W3C 2025."""
    height, width = shape
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    deflate = isal_zlib.compressobj(1)
    body = [deflate.compress(band.data) for band in rows]
    body.append(deflate.flush())
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *chunks, _chunk(b"IDAT", b"".join(body)), _chunk(b"IEND", b"")])


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = isal_zlib.crc32(data, isal_zlib.crc32(kind))
    return b"".join([struct.pack(">I", len(data)), kind, data, struct.pack(">I", checksum)])


def _colour_chunks(text: Mapping[str, str]) -> list[bytes]:
    return [_chunk(b"sRGB", _INTENT_PERCEPTUAL), *(_text_chunk(*item) for item in text.items())]


def _text_chunk(keyword: str, value: str) -> bytes:
    """Return tEXt if Latin-1 can encode the value, else iTXt."""
    name = keyword.capitalize().encode("latin-1") + b"\0"
    try:
        return _chunk(b"tEXt", name + value.encode("latin-1"))
    except UnicodeEncodeError:
        return _chunk(b"iTXt", name + b"\0\0\0\0" + value.encode())
