"""ICC profiles: convert an image from its stored colour space to sRGB with littleCMS. A profile that can't be used is
ignored and noted; it never fails the image.
"""

from __future__ import annotations

import functools
import io
import struct
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageCms

Convert = Callable[[Image.Image], Image.Image]
"""Converts an image of one fixed mode to mode RGB in sRGB."""

_SPACES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab ": "LAB"}
_ROUNDING = 1
"""Grey levels. The many profiles that are named sRGB differ from it by no more; they need no conversion."""


def srgb_converter(profile: bytes | None, mode: str) -> tuple[Convert | None, str]:
    """Return the conversion to sRGB, None if the pixels only need another mode, and a note, empty unless `profile` is
    ignored. `mode`: RGB, L, CMYK or LAB.
    """
    if mode == "LAB":
        return _lab_transform(), ""
    if not profile:
        return _without_profile(mode), ""
    try:
        transform = _transform(profile, mode)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as exc:
        return _without_profile(mode), f"icc_profile_ignored: {exc}"
    return transform or _without_profile(mode), ""


@functools.cache
def srgb_profile() -> bytes:
    """Return a small sRGB profile to embed; the same bytes in every process."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    struct.pack_into(">6H", profile, 24, 2026, 1, 1, 0, 0, 0)  # the creation date: littleCMS takes it from the clock
    return bytes(profile)


def _without_profile(mode: str) -> Convert | None:
    """Return the conversion without a profile: Pillow's own for CMYK, as image viewers do."""
    return (lambda band: band.convert("RGB")) if mode == "CMYK" else None


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> Convert | None:
    """Return None if the profile is sRGB. Cached: a catalogue has few profiles, and building one takes milliseconds."""
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
    return bool(np.abs(after - before).max() <= _ROUNDING)
