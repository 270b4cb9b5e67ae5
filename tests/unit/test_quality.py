"""Each figure, on a mask for which its value is known."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from jobs.recipe import Review
from workers.imaging.pixels import Pixels
from workers.imaging.quality import measure_mask, review_reasons


def blank(height: int = 1200, width: int = 1600) -> Pixels:
    return np.zeros((height, width), np.uint8)


def boxed(*boxes: tuple[int, int, int, int]) -> Pixels:
    """A mask of boxes, each left, top, right, bottom."""
    mask = blank()
    for left, top, right, bottom in boxes:
        mask[top:bottom, left:right] = 255
    return mask


def reasons(mask: Pixels) -> tuple[str, ...]:
    """Review reasons under a recipe that requires whole subjects."""
    return review_reasons(measure_mask(mask), Review(max_border=0.02))


SOUND = boxed((400, 300, 1200, 900))


def test_a_sound_mask_needs_no_review() -> None:
    figures = measure_mask(SOUND)

    assert figures["subject_share"] == pytest.approx(0.25, abs=0.01)
    assert figures["pieces"] == 1 and figures["holes"] == 0
    assert reasons(SOUND) == ()


def test_an_empty_and_a_full_mask_need_review() -> None:
    assert "empty" in reasons(blank())
    assert "full" in reasons(boxed((0, 0, 1600, 1200)))


@pytest.mark.parametrize(
    ("side", "box"),
    [
        ("top", (400, 0, 1200, 900)),
        ("right", (400, 300, 1600, 900)),
        ("bottom", (400, 300, 1200, 1200)),
        ("left", (0, 300, 1200, 900)),
    ],
)
def test_a_subject_cut_by_the_border_is_measured_on_its_side(side: str, box: tuple[int, int, int, int]) -> None:
    figures = measure_mask(boxed(box))

    assert figures[f"border_{side}"] == pytest.approx(0.5, abs=0.01)
    assert sum(figures[f"border_{name}"] > 0 for name in ("top", "right", "bottom", "left")) == 1
    assert reasons(boxed(box)) == ("cut_off",)
    assert review_reasons(figures, Review()) == (), "portraits are cut by the border: no review by default"


def test_pieces_are_counted_without_specks() -> None:
    three = boxed((100, 100, 400, 400), (600, 100, 900, 400), (1100, 100, 1400, 400), (800, 800, 808, 808))

    assert measure_mask(three)["pieces"] == 3
    assert reasons(three) == ("pieces",)


def test_two_pieces_need_review_only_if_the_recipe_allows_one() -> None:
    figures = measure_mask(boxed((100, 100, 400, 400), (600, 100, 900, 400)))

    assert figures["pieces"] == 2
    assert review_reasons(figures, Review(max_pieces=1)) == ("pieces",)
    assert review_reasons(figures, Review()) == (), "shoes come in pairs: no review by default"


def test_holes_are_counted_without_bays() -> None:
    mask = SOUND.copy()
    mask[400:500, 500:600] = 0
    mask[600:700, 500:600] = 0
    mask[300:500, 1000:1100] = 0

    assert measure_mask(mask)["holes"] == 2


def test_uncertain_alpha_is_measured_as_share_of_the_subject() -> None:
    mask = SOUND.copy()
    mask[300:900, 400:800] = 128

    assert measure_mask(mask)["uncertain_share"] == pytest.approx(0.5, abs=0.01)
    assert reasons(mask) == ("uncertain",)


def test_a_softer_edge_is_wider_at_any_size() -> None:
    sharp, soft = (measure_mask(np.asarray(cv2.blur(SOUND, (width, width)), np.uint8)) for width in (3, 61))
    small = measure_mask(np.asarray(cv2.blur(SOUND, (61, 61))[::4, ::4].copy(), np.uint8))

    assert soft["edge_width_px"] == pytest.approx(55, rel=0.2)
    assert sharp["edge_width_px"] < soft["edge_width_px"] / 4
    assert small["edge_width_px"] == pytest.approx(soft["edge_width_px"] / 4, rel=0.2)


@pytest.mark.parametrize("shape", [(1, 1), (1, 10_000), (9000, 2), (7, 7)])
@pytest.mark.parametrize("level", [0, 128, 255])
def test_any_shape_has_all_figures(shape: tuple[int, int], level: int) -> None:
    figures = measure_mask(np.full(shape, level, np.uint8))

    assert len(figures) == 9
    assert all(np.isfinite(value) for value in figures.values())
