"""Image out: PNG, JPEG and WebP, all sRGB. The PNG writer takes rows in bands that stay in the processor's cache:
interleave, zero the colour under alpha 0, filter, deflate. No image-sized RGBA array is ever made.
"""

from __future__ import annotations

import io
import logging
import struct
import zlib
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from jobs.recipe import Rendition
from workers.imaging.colour import srgb_profile

logger = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]

_BAND_BYTES = 1 << 20
"""A band and its filtered copy fit a core's level 2 cache; from 0.5 to 2 MB it makes no difference."""
_FILTER_UP = 2
"""Each byte minus the one above: one subtraction over whole bands, within 2 % in size of the best single filter."""
_GREY, _RGB, _RGBA = 0, 2, 6
_INTENT_PERCEPTUAL = b"\0"
_EXIF_TAGS = {"artist": ExifTags.Base.Artist, "copyright": ExifTags.Base.Copyright}


class _Deflate(Protocol):
    def compress(self, data: memoryview, /) -> bytes: ...

    def flush(self) -> bytes: ...


def _load_isal() -> ModuleType | None:
    try:
        from isal import isal_zlib
    except ImportError:
        logger.warning("isal is not installed: PNG files are written by zlib, about four times slower.")
        return None
    module: ModuleType = isal_zlib
    return module


_isal = _load_isal()


def encode_cutout_png(rgb: Pixels, alpha: Pixels, *, text: Mapping[str, str]) -> bytes:
    """`rgb`: (H, W, 3), `alpha`: (H, W). Straight alpha, sRGB, colour zero where alpha is 0. `text`: values by keyword,
    kept in the file.
    """
    return _png(alpha.shape, _RGBA, _colour_chunks(text), _cutout_rows(rgb, alpha))


def encode_flat_png(rgb: Pixels, *, text: Mapping[str, str]) -> bytes:
    """`rgb`: (H, W, 3)."""
    return _png(rgb.shape[:2], _RGB, _colour_chunks(text), _plain_rows(rgb.reshape(len(rgb), -1)))


def encode_mask_png(alpha: Pixels) -> bytes:
    """`alpha`: (H, W), written as 8-bit grey."""
    return _png(alpha.shape, _GREY, [], _plain_rows(alpha))


def encode_with_pillow(pixels: Pixels, rendition: Rendition, credit: tuple[tuple[str, str], ...]) -> bytes:
    """`pixels`: (H, W, 3), or (H, W, 4) for WebP. JPEG keeps full colour resolution: product edges are sharp and
    coloured. `credit`: artist and copyright, the only EXIF there is.
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
    """Filtered rows, (N, 1 + 4 W) each. The buffers are used again: take what you need before the next."""
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
    """`lines`: (H, bytes of a row). As `_cutout_rows`."""
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
    deflate = _deflate()
    body = [deflate.compress(band.data) for band in rows]
    body.append(deflate.flush())
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *chunks, _chunk(b"IDAT", b"".join(body)), _chunk(b"IEND", b"")])


def _deflate() -> _Deflate:
    compressor: _Deflate
    if _isal is None:
        compressor = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    else:
        compressor = _isal.compressobj(1)
    return compressor


def _chunk(kind: bytes, data: bytes) -> bytes:
    crc32 = zlib.crc32 if _isal is None else _isal.crc32
    return b"".join([struct.pack(">I", len(data)), kind, data, struct.pack(">I", crc32(data, zlib.crc32(kind)))])


def _colour_chunks(text: Mapping[str, str]) -> list[bytes]:
    return [_chunk(b"sRGB", _INTENT_PERCEPTUAL), *(_text_chunk(*item) for item in text.items())]


def _text_chunk(keyword: str, value: str) -> bytes:
    """tEXt where Latin-1 holds the value, else iTXt."""
    name = keyword.capitalize().encode("latin-1") + b"\0"
    try:
        return _chunk(b"tEXt", name + value.encode("latin-1"))
    except UnicodeEncodeError:
        return _chunk(b"iTXt", name + b"\0\0\0\0" + value.encode())
