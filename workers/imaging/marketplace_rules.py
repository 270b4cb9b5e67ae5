"""A rendition measured against its rules: read back from the bytes that are published, never from what was meant."""

from __future__ import annotations

import dataclasses
import io
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jobs.recipe import Rendition, Rules
from workers.imaging.colour import srgb_profile

Pixels = NDArray[np.uint8]

_BLOCK = 16
"""JPEG codes colour in blocks of this many pixels, so a soft edge rings that far; beyond, background must be exact."""
_RINGING = 8
"""Grey levels; what differs by more is another colour, not ringing."""
_FILL_TOLERANCE = 0.01


@dataclasses.dataclass(frozen=True)
class Check:
    """`name`: format, colour_space, pixels, megabytes, fill or background. `limit`: what the rule asks, in words."""

    name: str
    verdict: Literal["pass", "warn", "fail"]
    value: str
    limit: str


def check_rendition(body: bytes, rendition: Rendition, *, longest_subject: int) -> tuple[Check, ...]:
    """`longest_subject`: the subject's longest side in the rendition's pixels. Empty without rules."""
    rules = rendition.rules
    if rules is None:
        return ()
    with Image.open(io.BytesIO(body)) as image:
        kind = (image.format or "").lower()
        space = "sRGB" if _is_srgb(image) else f"{image.mode}, another profile or none"
        pixels = np.asarray(image.convert("RGB"))
    longest = max(pixels.shape[:2])
    checks = [
        _check("format", kind == rendition.format, kind, rendition.format),
        _check("colour_space", space == "sRGB", space, "sRGB"),
        _check_pixels(longest, rules),
        _check(
            "megabytes",
            not rules.max_mb or len(body) <= rules.max_mb * 1e6,
            f"{len(body) / 1e6:.2f}",
            _at_most(rules.max_mb),
        ),
        _check_fill(longest_subject / longest, rules),
    ]
    if rules.exact_background:
        checks.append(_check_background(pixels, rendition))
    return tuple(checks)


def _check(name: str, holds: bool, value: str, limit: str) -> Check:
    return Check(name, "pass" if holds else "fail", value, limit)


def _check_pixels(longest: int, rules: Rules) -> Check:
    limit = f"at least {rules.min_px}, better {rules.advised_px}, {_at_most(rules.max_px)}"
    if longest < rules.min_px or (rules.max_px and longest > rules.max_px):
        return Check("pixels", "fail", str(longest), limit)
    return Check("pixels", "warn" if longest < rules.advised_px else "pass", str(longest), limit)


def _check_fill(fill: float, rules: Rules) -> Check:
    """Marketplaces measure by eye: within a hundredth of the limit is a warning."""
    limit = f"{rules.min_fill:g} to {rules.max_fill:g}"
    beyond = max(rules.min_fill - fill, fill - rules.max_fill, 0.0)
    verdict: Literal["pass", "warn", "fail"] = "pass" if not beyond else "warn" if beyond <= _FILL_TOLERANCE else "fail"
    return Check("fill", verdict, f"{fill:.3f}", limit)


def _check_background(pixels: Pixels, rendition: Rendition) -> Check:
    """The frame's outermost lines, and all that is farther than a block from another colour."""
    colour = np.array(list(bytes.fromhex(rendition.background[1:])))
    other = cv2.bitwise_not(cv2.inRange(pixels, colour - _RINGING, colour + _RINGING))
    near = cv2.dilate(other, np.ones((2 * _BLOCK + 1, 2 * _BLOCK + 1), np.uint8))
    exact = cv2.inRange(pixels, colour, colour)
    clear = int((near == 0).sum())
    wrong = clear - int(((near == 0) & (exact > 0)).sum())
    value = f"{wrong} of {clear} pixels differ" if clear else "no background in sight"
    return _check("background", clear > 0 and not wrong, value, f"exactly {rendition.background}")


def _is_srgb(image: Image.Image) -> bool:
    profile = image.info.get("icc_profile")
    return image.mode in ("RGB", "RGBA") and (profile == srgb_profile() or (profile is None and "srgb" in image.info))


def _at_most(limit: float) -> str:
    return f"at most {limit:g}" if limit else "no upper limit"
