"""Colour profiles: whatever space an image was stored in becomes sRGB, by littleCMS. A profile that can't be used is
left out and noted; it never costs the image.
"""

from __future__ import annotations

import functools
import io
import struct
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageCms

Convert = Callable[[Image.Image], Image.Image]
"""Takes an image of the mode it was made for, gives one of mode RGB in sRGB."""

_SPACES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab ": "LAB"}
_SAME = 1
"""Grey levels: the many profiles that call themselves sRGB differ by rounding only, and are left out."""


def srgb_converter(profile: bytes | None, mode: str) -> tuple[Convert | None, str]:
    """`mode`: RGB, L, CMYK or LAB. Returns None where the pixels are sRGB already but for their mode, and a note,
    empty unless a profile was left out.
    """
    if mode == "LAB":
        return _lab_transform(), ""
    if not profile:
        return _plain(mode), ""
    try:
        transform = _transform(profile, mode)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as exc:
        return _plain(mode), f"icc_profile_ignored: {exc}"
    return transform or _plain(mode), ""


@functools.cache
def srgb_profile() -> bytes:
    """A small sRGB profile for the formats that carry one: the same bytes in every process."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    struct.pack_into(">6H", profile, 24, 2026, 1, 1, 0, 0, 0)  # its date, which littleCMS takes from the clock
    return bytes(profile)


def _plain(mode: str) -> Convert | None:
    """CMYK without a profile: the plain conversion, as every viewer does it."""
    return (lambda band: band.convert("RGB")) if mode == "CMYK" else None


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> Convert | None:
    """None when the profile is sRGB. A catalogue has few profiles; building one takes milliseconds."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space
    if _SPACES.get(space) != mode:
        raise ValueError(f"a profile for {space.strip()} in an image of mode {mode}")
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode in ("RGB", "L") and _changes_nothing(transform, mode):
        return None
    return transform.apply


@functools.cache
def _lab_transform() -> Convert:
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB").apply


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    levels = np.linspace(0, 255, 18).astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    pixels = Image.fromarray(np.ascontiguousarray(grid)) if mode == "RGB" else Image.fromarray(levels[None])
    before = np.asarray(pixels.convert("RGB"), np.int16)
    after = np.asarray(transform.apply(pixels), np.int16)
    return bool(np.abs(after - before).max() <= _SAME)
