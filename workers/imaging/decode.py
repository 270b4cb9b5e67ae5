"""Decode an image of any supported format to upright 8-bit sRGB, or raise `ContentError`. The limits are checked on the
header, before decoding. A truncated file is refused, never decoded in part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Literal

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from jobs.errors import ContentError
from workers.imaging.colour import Convert, srgb_converter
from workers.imaging.formats import ANIMATED, is_truncated, open_image, sniff_format
from workers.imaging.pixels import Pixels

Image.MAX_IMAGE_PIXELS = None  # `Limits` is checked on every header instead; Pillow would first only warn

_BAND_PIXELS = 1 << 18
_BASE_MODES = {"1": "L", "L": "L", "LA": "L", "La": "L", "CMYK": "CMYK", "LAB": "LAB"}
"""By Pillow mode: the mode that an ICC profile is applied in. Any other mode is converted to RGB first."""
_DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
_TRUNCATED = re.compile(r"truncated|premature end|unexpected end|end of (file|stream)|not enough (image )?data", re.I)
_HARMLESS = re.compile(r"extraneous bytes|ICC marker|JFIF|Adobe|subsampling", re.I)
"""libjpeg warnings that affect no pixel; Pillow decodes these files."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """`max_pixels`: width times height. `max_bytes`: size of the file."""

    max_pixels: int = 100_000_000
    max_bytes: int = 100_000_000


@dataclasses.dataclass(frozen=True)
class DecodedImage:
    """`rgb`: (H, W, 3) upright sRGB, writable. `alpha`: (H, W), None if nothing is transparent. `notes`: what was
    ignored or scaled. `credit`: artist and copyright from EXIF or from a PNG's text, if present.
    """

    rgb: Pixels
    alpha: Pixels | None = None
    notes: tuple[str, ...] = ()
    credit: tuple[tuple[str, str], ...] = ()


def decode_image(data: bytes, *, limits: Limits, animation: Literal["first", "refuse"]) -> DecodedImage:
    """Decode the first frame, or the main image of a multi-image JPEG or HEIC, which is never an animation.

    Raises `ContentError`: `too_many_bytes`, `too_many_pixels`, `not_an_image`, `unsupported_format`, `truncated`,
    `damaged`, `animated`.
    """
    if len(data) > limits.max_bytes:
        raise ContentError(
            f"The file has {len(data) / 1e6:.1f} MB, the limit is {limits.max_bytes / 1e6:g} MB "
            "(CUTFLEET_MAX_BYTES_MB).",
            code="too_many_bytes",
        )
    kind = sniff_format(data)
    if is_truncated(data, kind):
        raise ContentError(
            f"The {kind} has {len(data)} bytes and declares more: the upload is incomplete.", code="truncated"
        )
    with _decoder_errors(kind), open_image(data, kind) as image:
        _check_pixels(image.width, image.height, limits)
        if animation == "refuse" and kind in ANIMATED and getattr(image, "is_animated", False):
            raise ContentError(
                f'The {kind} has several frames, and the recipe has animation = "refuse".', code="animated"
            )
        return _decode(image, data, limits)


def count_pixels(data: bytes, limits: Limits) -> int:
    """Return width times height from the header; 0 for an image that `decode_image` refuses."""
    try:
        with open_image(data, sniff_format(data)) as image:
            pixels = image.width * image.height
            return pixels if pixels <= limits.max_pixels else 0
    except Exception:  # `decode_image` raises it again, with its code
        return 0


@contextlib.contextmanager
def _decoder_errors(kind: str) -> Iterator[None]:
    try:
        yield
    except (ContentError, MemoryError):
        raise
    except Exception as exc:  # decoders raise a dozen types; the cause is always these bytes
        reason = _reason(exc)
        if _TRUNCATED.search(reason):
            raise ContentError(
                f"The {kind} is truncated, probably an incomplete upload: {reason}", code="truncated"
            ) from exc
        raise ContentError(f"The {kind} can't be decoded: {reason}", code="damaged") from exc


def _reason(exc: Exception) -> str:
    if isinstance(exc, UnidentifiedImageError):
        return "the header can't be read"
    return " ".join(str(exc).split()) or type(exc).__name__


def _check_pixels(width: int, height: int, limits: Limits) -> None:
    if width < 1 or height < 1:
        raise ContentError(f"The header declares {width} x {height} pixels.", code="damaged")
    if width * height > limits.max_pixels:
        raise ContentError(
            f"The image has {width} x {height} pixels ({width * height / 1e6:.1f} MP), the limit is "
            f"{limits.max_pixels / 1e6:g} MP (CUTFLEET_MAX_PIXELS_MP).",
            code="too_many_pixels",
        )


def _decode(image: Image.Image, data: bytes, limits: Limits) -> DecodedImage:
    notes: list[str] = []
    base = "L" if image.mode in _DEEP_MODES else _BASE_MODES.get(image.mode, "RGB")
    convert, note = srgb_converter(image.info.get("icc_profile"), base)
    notes += [note] if note else []
    rgb = _decode_jpeg(image, data, notes)
    alpha = None
    if rgb is None:
        image.load()
        _check_pixels(image.width, image.height, limits)
        rgb, alpha = _convert_deep(image, convert, notes) if image.mode in _DEEP_MODES else _convert(image, convert)
    elif convert is not None:
        _convert_in_place(rgb, base, convert)
    orientation, credit = _exif(image, notes)
    opaque = alpha is None or int(alpha.min()) == 255
    return DecodedImage(
        rgb=_upright(rgb, orientation),
        alpha=None if alpha is None or opaque else _upright(alpha, orientation),
        notes=tuple(notes),
        credit=credit,
    )


def _decode_jpeg(image: Image.Image, data: bytes, notes: list[str]) -> Pixels | None:
    """Return None if Pillow must decode: another format, CMYK, or a JPEG with a warning of `_HARMLESS`."""
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    try:
        rgb: Pixels = simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError as exc:
        if not _HARMLESS.search(str(exc)):
            raise
        notes.append(f"jpeg_warning: {exc}")
        return None
    if rgb.shape[:2] != (image.height, image.width):
        raise ValueError(f"the header declares {image.size} pixels, the data has {rgb.shape[1::-1]}")
    return rgb


def _convert(image: Image.Image, convert: Convert | None) -> tuple[Pixels, Pixels | None]:
    """Convert in bands, so that memory holds no third copy beside Pillow's image and the result."""
    base = _BASE_MODES.get(image.mode, "RGB")
    rgb = np.empty((image.height, image.width, 3), np.uint8)
    alpha = np.empty(rgb.shape[:2], np.uint8) if image.has_transparency_data else None
    for top, bottom in _bands(rgb):
        band = image.crop((0, top, image.width, bottom))
        colour = band
        if alpha is not None:
            rgba = band.convert("RGBA")
            alpha[top:bottom] = np.asarray(rgba.getchannel("A"))
            colour = rgba.getchannel("R") if base == "L" else rgba
        colour = colour if colour.mode == base else colour.convert(base)
        rgb[top:bottom] = np.asarray(convert(colour) if convert else colour.convert("RGB"))
    return rgb, alpha


def _convert_in_place(rgb: Pixels, base: str, convert: Convert) -> None:
    for top, bottom in _bands(rgb):
        band = rgb[top:bottom] if base == "RGB" else np.ascontiguousarray(rgb[top:bottom, :, 0])
        rgb[top:bottom] = np.asarray(convert(Image.fromarray(band)))


def _convert_deep(image: Image.Image, convert: Convert | None, notes: list[str]) -> tuple[Pixels, Pixels | None]:
    """Scale 16-bit, 32-bit and float grey to 8 bits without clipping: 16-bit by 1/257, float in [0, 1] by 255. Anything
    else is scaled from its own range, with a note.
    """
    values = np.asarray(image)
    key = image.info.get("transparency")
    alpha = np.where(values == key, 0, 255).astype(np.uint8) if isinstance(key, int) else None
    grey = _scale_to_bytes(values, notes)
    if convert is None:
        return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB).astype(np.uint8, copy=False), alpha
    return _convert(Image.fromarray(grey), convert)[0], alpha


def _scale_to_bytes(values: NDArray[np.generic], notes: list[str]) -> Pixels:
    if values.dtype.itemsize == 2:
        return _BYTE_OF_16_BITS[values.astype(np.uint16, copy=False)]
    numbers = np.nan_to_num(values.astype(np.float32), posinf=np.nan, neginf=np.nan, nan=0.0)
    low, high = float(numbers.min()), float(numbers.max())
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif values.dtype.kind == "i" and low >= 0 and 255 < high <= 65535:
        low, high = 0.0, 65535.0
    else:
        notes.append(f"scaled_from_own_range: {low:g} to {high:g}")
    scaled: Pixels = np.rint((numbers - low) * (255 / ((high - low) or 1))).astype(np.uint8)
    return scaled


_BYTE_OF_16_BITS = ((np.arange(65536) * 255 + 32767) // 65535).astype(np.uint8)


def _bands(rgb: Pixels) -> Iterator[tuple[int, int]]:
    height, width = rgb.shape[:2]
    step = max(1, _BAND_PIXELS // width)
    for top in range(0, height, step):
        yield top, min(top + step, height)


def _exif(image: Image.Image, notes: list[str]) -> tuple[int, tuple[tuple[str, str], ...]]:
    """Return orientation, 1 if missing or invalid, and artist and copyright, which our PNGs keep as text."""
    try:
        exif = image.getexif()
        orientation = exif.get(ExifTags.Base.Orientation)
        fields = {
            "artist": exif.get(ExifTags.Base.Artist) or image.info.get("Artist"),
            "copyright": exif.get(ExifTags.Base.Copyright) or image.info.get("Copyright"),
        }
    except Exception as exc:  # Pillow's EXIF reader raises any type on damage; the pixels are intact
        notes.append(f"exif_ignored: {exc}")
        return 1, ()
    credit = tuple((name, text.strip("\0 ")) for name, text in fields.items() if isinstance(text, str) and text)
    return (orientation if isinstance(orientation, int) else 1), credit


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Turn and mirror by EXIF 2.32, tag 0x0112. Any `orientation` but 2 to 8 leaves the pixels unchanged."""
    match orientation:
        case 2:
            turned = cv2.flip(pixels, 1)
        case 3:
            turned = cv2.rotate(pixels, cv2.ROTATE_180)
        case 4:
            turned = cv2.flip(pixels, 0)
        case 5:
            turned = cv2.transpose(pixels)
        case 6:
            turned = cv2.rotate(pixels, cv2.ROTATE_90_CLOCKWISE)
        case 7:
            turned = cv2.flip(cv2.transpose(pixels), -1)
        case 8:
            turned = cv2.rotate(pixels, cv2.ROTATE_90_COUNTERCLOCKWISE)
        case _:
            return pixels
    return np.asarray(turned, np.uint8)
