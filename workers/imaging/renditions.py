"""Make renditions of a cutout: crop, centre, flatten, encode, and check them against their rules. They need no model,
so a changed recipe can be rendered from the stored cutout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from jobs.recipe import Rendition
from workers.imaging.encode import encode_cutout_png, encode_flat_png, encode_with_pillow
from workers.imaging.marketplace_rules import RuleResult, check_rendition
from workers.imaging.pixels import Pixels

Credit = tuple[tuple[str, str], ...]

_BAND_PIXELS = 1 << 18
_SUBJECT = 13
"""Smallest alpha, 5 %, that counts as subject in its bounding box."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """`body`: the file. `checks`: empty if the rendition has no rules."""

    body: bytes
    content_type: str
    checks: tuple[RuleResult, ...] = ()

    @property
    def findings(self) -> tuple[tuple[str, str, str, str], ...]:
        """The checks in the form that an image's note stores: name, verdict, value, limit."""
        return tuple((check.name, check.verdict, check.value, check.limit) for check in self.checks)


@dataclasses.dataclass(frozen=True)
class Box:
    """Pixels `left` to `right` and `top` to `bottom`, the ends excluded; may extend beyond the image."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def longest(self) -> int:
        return max(self.width, self.height)


def render_all(
    rgb: Pixels,
    alpha: Pixels,
    renditions: tuple[Rendition, ...],
    *,
    credit: Credit = (),
    text: Mapping[str, str] | None = None,
) -> Mapping[str, Encoded]:
    """Return the renditions by name; empty if there is no subject, since a blank image is never a result. `rgb`: (H, W,
    3), `alpha`: (H, W), straight.
    """
    subject = find_subject(alpha) if renditions else None
    if subject is None:
        return {}
    return {
        rendition.name: render(rgb, alpha, rendition, subject=subject, credit=credit, text=text)
        for rendition in renditions
    }


def render(
    rgb: Pixels,
    alpha: Pixels,
    rendition: Rendition,
    *,
    subject: Box,
    credit: Credit = (),
    text: Mapping[str, str] | None = None,
) -> Encoded:
    """Make one rendition. `subject`: from `find_subject`. `text`: for a PNG's text chunks."""
    frame, scale = lay_out(alpha.shape, subject, rendition)
    if rendition.background == "transparent":
        pixels, cover = _place_transparent(rgb, alpha, frame, scale)
        body = _encode_transparent(pixels, cover, rendition, credit, text or {})
    else:
        colour = background_colour(rendition)
        pixels = _place_flat(rgb, alpha, frame, scale, colour)
        body = _encode_flat(pixels, rendition, credit, text or {})
    checks = check_rendition(body, rendition, longest_subject=round(subject.longest * scale))
    return Encoded(body, rendition.content_type, checks)


def find_subject(alpha: Pixels) -> Box | None:
    """Return the bounding box of the subject; None if there is none."""
    left, top, width, height = cv2.boundingRect(cv2.inRange(alpha, _SUBJECT, 255))
    return Box(left, top, left + width, top + height) if width and height else None


def lay_out(shape: tuple[int, ...], subject: Box, rendition: Rendition) -> tuple[Box, float]:
    """Return the frame in source pixels and the scale from source to rendition pixels. `shape`: (H, W)."""
    match rendition.canvas:
        case "source":
            frame = Box(0, 0, shape[1], shape[0])
        case "trim":
            margin = round(rendition.margin * subject.longest)
            frame = Box(subject.left - margin, subject.top - margin, subject.right + margin, subject.bottom + margin)
        case "square":
            frame = _centred(subject, round(subject.longest / rendition.fill))
    scale = 1.0
    if rendition.min_px > frame.longest:
        scale = min(rendition.min_px / frame.longest, rendition.max_upscale)
    if rendition.max_px and frame.longest > rendition.max_px:
        scale = rendition.max_px / frame.longest
    if rendition.canvas == "square" and frame.longest * scale < rendition.min_px:
        frame = _centred(subject, round(rendition.min_px / scale))
    return frame, scale


def background_colour(rendition: Rendition) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(rendition.background[1:])
    return red, green, blue


def _centred(subject: Box, side: int) -> Box:
    left = (subject.left + subject.right - side) // 2
    top = (subject.top + subject.bottom - side) // 2
    return Box(left, top, left + side, top + side)


def _place_flat(rgb: Pixels, alpha: Pixels, frame: Box, scale: float, colour: tuple[int, int, int]) -> Pixels:
    """Flatten, then resize: in this order the background keeps exactly its colour."""
    pixels = _crop(rgb, frame, colour)
    cover = _crop(alpha, frame, 0)
    rows = max(1, _BAND_PIXELS // frame.width)
    for top in range(0, frame.height, rows):
        share = cv2.cvtColor(cover[top : top + rows], cv2.COLOR_GRAY2RGB)
        ground = cv2.multiply(np.full_like(share, colour), 255 - share, scale=1 / 255)
        cv2.add(cv2.multiply(pixels[top : top + rows], share, scale=1 / 255), ground, dst=pixels[top : top + rows])
    return _resize(pixels, frame, scale)


def _place_transparent(rgb: Pixels, alpha: Pixels, frame: Box, scale: float) -> tuple[Pixels, Pixels]:
    """Resize with premultiplied alpha, so that the colour of transparent pixels does not bleed into the edge."""
    pixels, cover = _crop(rgb, frame, (0, 0, 0)), _crop(alpha, frame, 0)
    if _target_size(frame, scale) == (frame.width, frame.height):
        return pixels, cover
    mixed = _resize(pixels.astype(np.uint16) * cover[..., None], frame, scale).astype(np.uint32)
    share = _resize(cover.astype(np.uint16) * 255, frame, scale).astype(np.uint32)
    half = share[..., None] // 2
    straight = (mixed * 255 + half) // np.maximum(share, 1)[..., None]
    return np.minimum(straight, 255).astype(np.uint8), ((share + 127) // 255).astype(np.uint8)


def _crop(pixels: Pixels, frame: Box, fill: int | tuple[int, int, int]) -> Pixels:
    """Return the pixels inside `frame`, with `fill` where it extends beyond the image."""
    height, width = pixels.shape[:2]
    inside = pixels[max(0, frame.top) : max(0, frame.bottom), max(0, frame.left) : max(0, frame.right)]
    before = (max(0, -frame.top), max(0, -frame.left))
    after = (max(0, frame.bottom - height), max(0, frame.right - width))
    return np.asarray(
        cv2.copyMakeBorder(inside, before[0], after[0], before[1], after[1], cv2.BORDER_CONSTANT, value=fill), np.uint8
    )


def _target_size(frame: Box, scale: float) -> tuple[int, int]:
    return max(1, round(frame.width * scale)), max(1, round(frame.height * scale))


def _resize(pixels: NDArray[Any], frame: Box, scale: float) -> NDArray[Any]:
    target = _target_size(frame, scale)
    if target == (frame.width, frame.height):
        return pixels
    return np.asarray(cv2.resize(pixels, target, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR))


def _encode_flat(pixels: Pixels, rendition: Rendition, credit: Credit, text: Mapping[str, str]) -> bytes:
    if rendition.format == "png":
        return encode_flat_png(pixels, text={**text, **dict(credit)})
    return encode_with_pillow(pixels, rendition, credit=credit)


def _encode_transparent(
    pixels: Pixels, cover: Pixels, rendition: Rendition, credit: Credit, text: Mapping[str, str]
) -> bytes:
    if rendition.format == "png":
        return encode_cutout_png(pixels, cover, text={**text, **dict(credit)})
    rgba = np.dstack([pixels, cover])
    rgba[cover == 0] = 0
    return encode_with_pillow(rgba, rendition, credit=credit)
