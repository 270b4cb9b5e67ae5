"""Measure the quality of a mask. All figures are taken from the mask reduced to `_SIDE` at its longest side, so that
they are comparable at any size and take at most a few milliseconds.

subject_share     sum(alpha) / (255 N), N all pixels: share of the frame
uncertain_share   count(0.05 < alpha < 0.95) / count(alpha >= 0.05): share of the subject that is soft
border_top, border_right, border_bottom, border_left
                  count(alpha >= 0.5) / n along that outermost line: the frame cuts the subject there
pieces            8-connected regions of alpha >= 0.5 with at least 1 % of the subject's pixels
holes             4-connected regions of alpha < 0.5 that touch no border, with at least 0.1 % of the subject's pixels
edge_width_px     2 count(0.05 < alpha < 0.95) / (border pixels of alpha >= 0.5, both sides), in source pixels: a
                  small value is a sharp edge; a straight edge that rises over w pixels gives about 0.9 w
"""

from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np

from jobs.recipe import Review
from workers.imaging.pixels import Pixels

_SIDE = 256
_SEARCH_SIDE = 1024
"""Longest side of the mask that is searched for the worst edge: exact enough for a part of some hundred pixels."""
_CLEAR, _HALF, _SURE = 13, 128, 242
"""0.05, 0.5 and 0.95 of 255."""
_PIECE_SHARE, _HOLE_SHARE = 0.01, 0.001
_BORDERS = ("border_top", "border_right", "border_bottom", "border_left")


def measure_mask(alpha: Pixels) -> Mapping[str, float]:
    """Return the figures listed above, rounded to four digits. `alpha`: (H, W)."""
    small, scale = _reduced(alpha)
    solid = (small >= _HALF).astype(np.uint8)
    subject = int(solid.sum())
    uncertain = int(((small > _CLEAR) & (small < _SURE)).sum())
    sides = (solid[0], solid[:, -1], solid[-1], solid[:, 0])
    figures = {
        "subject_share": float(small.mean()) / 255,
        "uncertain_share": uncertain / max(1, int((small >= _CLEAR).sum())),
        **{name: float(line.mean()) for name, line in zip(_BORDERS, sides, strict=True)},
        "pieces": float(_count_regions(solid, subject * _PIECE_SHARE)),
        "holes": float(_count_holes(solid, subject * _HOLE_SHARE)),
        "edge_width_px": 2 * uncertain * scale / max(1, _border_pixels(solid)),
    }
    return {name: round(value, 4) for name, value in figures.items()}


def review_reasons(figures: Mapping[str, float], review: Review) -> tuple[str, ...]:
    """Return why a person should review the image, worst first: `empty`, `full`, `uncertain`, `cut_off`, `pieces`,
    `holes`.
    """
    reasons = {
        "empty": figures["subject_share"] < review.min_subject,
        "full": figures["subject_share"] > review.max_subject,
        "uncertain": figures["uncertain_share"] > review.max_uncertain,
        "cut_off": max(figures[name] for name in _BORDERS) > review.max_border,
        "pieces": figures["pieces"] > review.max_pieces,
        "holes": figures["holes"] > review.max_holes,
    }
    return tuple(name for name, applies in reasons.items() if applies)


def find_worst_edge(alpha: Pixels, side: int) -> tuple[slice, slice]:
    """Return rows and columns of the part, at most `side` by `side`, with the most pixels of 0.05 < alpha < 0.95; of a
    mask that has none, the part with the most of the outline.
    """
    height, width = alpha.shape
    scale = max(1.0, max(alpha.shape) / _SEARCH_SIDE)
    size = (max(1, round(width / scale)), max(1, round(height / scale)))
    edge = cv2.inRange(alpha, _CLEAR + 1, _SURE - 1)
    if not edge.any():
        edge = cv2.morphologyEx(cv2.inRange(alpha, _HALF, 255), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    sums = cv2.integral(cv2.resize(edge, size, interpolation=cv2.INTER_AREA).astype(np.float64))
    rows, columns = (max(1, min(length, round(side / scale))) for length in reversed(size))
    density = sums[rows:, columns:] - sums[:-rows, columns:] - sums[rows:, :-columns] + sums[:-rows, :-columns]
    top, left = np.unravel_index(int(density.argmax()), density.shape)
    return _clip(round(int(top) * scale), side, height), _clip(round(int(left) * scale), side, width)


def _clip(start: int, side: int, length: int) -> slice:
    start = max(0, min(start, length - side))
    return slice(start, min(length, start + side))


def _reduced(alpha: Pixels) -> tuple[Pixels, float]:
    """Return the reduced mask, and the width of one of its pixels in source pixels."""
    scale = max(1.0, max(alpha.shape) / _SIDE)
    height, width = (max(1, round(side / scale)) for side in alpha.shape)
    if scale > 4:
        alpha = np.asarray(cv2.resize(alpha, (2 * width, 2 * height), interpolation=cv2.INTER_LINEAR), np.uint8)
    return np.asarray(cv2.resize(alpha, (width, height), interpolation=cv2.INTER_AREA), np.uint8), scale


def _count_regions(solid: Pixels, least: float) -> int:
    _, _, stats, _ = cv2.connectedComponentsWithStats(solid, connectivity=8)
    return int((stats[1:, cv2.CC_STAT_AREA] >= max(1.0, least)).sum())


def _count_holes(solid: Pixels, least: float) -> int:
    height, width = solid.shape
    _, _, stats, _ = cv2.connectedComponentsWithStats(1 - solid, connectivity=4)
    left, top, wide, high, area = stats[1:].T
    inside = (left > 0) & (top > 0) & (left + wide < width) & (top + high < height)
    return int((inside & (area >= max(1.0, least))).sum())


def _border_pixels(solid: Pixels) -> int:
    """Count the pixels on both sides of the outline, without the frame's border."""
    kernel = np.ones((3, 3), np.uint8)
    widest = cv2.dilate(solid, kernel, borderType=cv2.BORDER_REPLICATE)
    least = cv2.erode(solid, kernel, borderType=cv2.BORDER_REPLICATE)
    return int(np.count_nonzero(widest != least))
