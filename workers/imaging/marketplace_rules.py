"""Check a rendition against its marketplace's rules, by decoding the bytes that are published."""

from __future__ import annotations

import dataclasses
import io

import cv2
import numpy as np
from PIL import Image

from jobs.recipe import Rendition, Rules
from jobs.results import Verdict
from workers.imaging.colour import srgb_profile
from workers.imaging.pixels import Pixels

_BLOCK = 16
"""Side of the blocks of JPEG, in pixels. An edge can ring that far; beyond, the background must be exact."""
_RINGING = 8
"""Grey levels. A larger difference is another colour, not ringing."""
_FILL_TOLERANCE = 0.01
"""Marketplaces judge the fill by eye: a fill this close to its limit is a warning."""


@dataclasses.dataclass(frozen=True)
class RuleResult:
    """`name`: format, colour_space, pixels, megabytes, fill or background. `value`: measured. `limit`: required, in
    words.
    """

    name: str
    verdict: Verdict
    value: str
    limit: str


def check_rendition(body: bytes, rendition: Rendition, *, longest_subject: int) -> tuple[RuleResult, ...]:
    """Return a result for each rule; empty if the rendition has none. `longest_subject`: the subject's longest side in
    pixels of the rendition.
    """
    rules = rendition.rules
    if rules is None:
        return ()
    with Image.open(io.BytesIO(body)) as image:
        kind = (image.format or "").lower()
        space = "sRGB" if _is_srgb(image) else f"{image.mode}, another profile or none"
        pixels = np.asarray(image.convert("RGB"))
    longest = max(pixels.shape[:2])
    results = [
        _result("format", kind == rendition.format, kind, rendition.format),
        _result("colour_space", space == "sRGB", space, "sRGB"),
        _check_pixels(longest, rules),
        _result(
            "megabytes",
            not rules.max_mb or len(body) <= rules.max_mb * 1e6,
            f"{len(body) / 1e6:.2f}",
            _at_most(rules.max_mb),
        ),
        _check_fill(longest_subject / longest, rules),
    ]
    if rules.exact_background:
        results.append(_check_background(pixels, rendition))
    return tuple(results)


def _result(name: str, passes: bool, value: str, limit: str) -> RuleResult:
    return RuleResult(name, Verdict.PASS if passes else Verdict.FAIL, value, limit)


def _check_pixels(longest: int, rules: Rules) -> RuleResult:
    limit = f"at least {rules.min_px}, better {rules.advised_px}, {_at_most(rules.max_px)}"
    if longest < rules.min_px or (rules.max_px and longest > rules.max_px):
        return RuleResult("pixels", Verdict.FAIL, str(longest), limit)
    return RuleResult("pixels", Verdict.WARN if longest < rules.advised_px else Verdict.PASS, str(longest), limit)


def _check_fill(fill: float, rules: Rules) -> RuleResult:
    limit = f"{rules.min_fill:g} to {rules.max_fill:g}"
    beyond = max(rules.min_fill - fill, fill - rules.max_fill, 0.0)
    verdict = Verdict.FAIL if beyond > _FILL_TOLERANCE else Verdict.WARN if beyond else Verdict.PASS
    return RuleResult("fill", verdict, f"{fill:.3f}", limit)


def _check_background(pixels: Pixels, rendition: Rendition) -> RuleResult:
    """Check the pixels that are more than a block away from any other colour: they must have the exact background."""
    colour = np.array(list(bytes.fromhex(rendition.background[1:])))
    other = cv2.bitwise_not(cv2.inRange(pixels, colour - _RINGING, colour + _RINGING))
    near = cv2.dilate(other, np.ones((2 * _BLOCK + 1, 2 * _BLOCK + 1), np.uint8))
    exact = cv2.inRange(pixels, colour, colour)
    clear = int((near == 0).sum())
    wrong = clear - int(((near == 0) & (exact > 0)).sum())
    value = f"{wrong} of {clear} pixels differ" if clear else "no background found"
    return _result("background", clear > 0 and not wrong, value, f"exactly {rendition.background}")


def _is_srgb(image: Image.Image) -> bool:
    profile = image.info.get("icc_profile")
    return image.mode in ("RGB", "RGBA") and (profile == srgb_profile() or (profile is None and "srgb" in image.info))


def _at_most(limit: float) -> str:
    return f"at most {limit:g}" if limit else "no upper limit"
