"""Clean the edges of composites whose foreground is known; measure the colour error of soft pixels."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from workers.imaging.edges import clean_edges
from workers.imaging.pixels import Pixels


def gradient(corners: list[list[tuple[int, int, int]]], height: int, width: int) -> Pixels:
    return np.asarray(
        cv2.resize(np.array(corners, np.uint8), (width, height), interpolation=cv2.INTER_LINEAR), np.uint8
    )


def soft_shape(height: int, width: int, *, blur: float) -> Pixels:
    """An ellipse with hairs around it."""
    alpha = np.zeros((height, width), np.uint8)
    centre = (width // 2, height // 2)
    cv2.ellipse(alpha, centre, (width // 4, height // 4), 20, 0, 360, 255, -1)
    for turn in np.linspace(0, 2 * np.pi, 90, endpoint=False):
        tip = (int(centre[0] + 0.32 * width * np.cos(turn)), int(centre[1] + 0.32 * height * np.sin(turn)))
        cv2.line(alpha, centre, tip, 255, 2, cv2.LINE_AA)
    return np.asarray(cv2.GaussianBlur(alpha, (0, 0), blur), np.uint8)


def mixed(subject: Pixels, ground: Pixels, alpha: Pixels) -> Pixels:
    share = alpha[..., None] / 255
    return np.rint(subject * share + ground * (1 - share)).astype(np.uint8)


def colour_error(rgb: Pixels, truth: Pixels, alpha: Pixels) -> float:
    soft = (alpha > 12) & (alpha < 243)
    return float(np.abs(rgb[soft].astype(int) - truth[soft].astype(int)).mean())


SUBJECT = gradient([[(180, 60, 40), (210, 140, 60)], [(90, 40, 120), (200, 90, 90)]], 600, 800)
GROUNDS = {
    "white": np.full_like(SUBJECT, 255),
    "green": np.full_like(SUBJECT, (20, 190, 60)),
    "sky": gradient([[(60, 120, 220), (120, 180, 250)], [(230, 240, 250), (200, 220, 240)]], 600, 800),
    "stripes": np.tile(np.repeat(np.array([[[10, 40, 30]], [[220, 230, 90]]], np.uint8), 25, axis=0), (12, 800, 1)),
}


@pytest.mark.parametrize("blur", [1.5, 4, 10])
@pytest.mark.parametrize("ground", GROUNDS)
def test_the_colour_error_of_soft_pixels_is_at_least_halved(ground: str, blur: float) -> None:
    alpha = soft_shape(600, 800, blur=blur)
    image = mixed(SUBJECT, GROUNDS[ground], alpha)
    before = colour_error(image, SUBJECT, alpha)

    clean_edges(image, alpha)

    assert colour_error(image, SUBJECT, alpha) <= before / 2


def test_opaque_and_transparent_pixels_do_not_change() -> None:
    alpha = soft_shape(600, 800, blur=4)
    image = mixed(SUBJECT, GROUNDS["green"], alpha)
    before = image.copy()

    clean_edges(image, alpha)

    untouched = (alpha == 0) | (alpha == 255)
    assert np.array_equal(image[untouched], before[untouched])
    assert not np.array_equal(image, before)


@pytest.mark.parametrize("shape", [(1, 1), (1, 900), (700, 1), (2, 3), (40, 5000)])
@pytest.mark.parametrize("level", [0, 1, 128, 254, 255])
def test_odd_shapes_and_constant_masks_raise_nothing(shape: tuple[int, int], level: int) -> None:
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    before = image.copy()

    clean_edges(image, np.full(shape, level, np.uint8))

    assert np.array_equal(image, before) or 0 < level < 255


def test_the_height_of_a_band_changes_no_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    alpha = soft_shape(600, 800, blur=4)
    whole = mixed(SUBJECT, GROUNDS["sky"], alpha)
    banded = whole.copy()

    clean_edges(whole, alpha)
    monkeypatch.setattr("workers.imaging.edges.BAND_PIXELS", 7 * 800)
    clean_edges(banded, alpha)

    assert np.array_equal(whole, banded)


def extended(rgb: Pixels, alpha: Pixels) -> Pixels:
    """Replace every pixel that is not opaque by the nearest opaque one: a subject whose colour is known everywhere."""
    solid = (alpha == 255).astype(np.uint8)
    _, nearest = cv2.distanceTransformWithLabels(1 - solid, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    opaque = np.flatnonzero(solid)
    pixel_of = np.zeros(nearest.max() + 1, np.int64)
    pixel_of[nearest.reshape(-1)[opaque]] = opaque
    return np.asarray(rgb.reshape(-1, 3)[pixel_of[nearest]], np.uint8)


def matted_photographs(folder: Path) -> list[tuple[Pixels, Pixels]]:
    """Subjects of photographs with a true alpha of hair and fur; one generated subject if there are no photographs."""
    if not (folder / "manifest.csv").exists():
        alpha = soft_shape(600, 800, blur=4)
        return [(extended(mixed(SUBJECT, GROUNDS["green"], alpha), alpha), alpha)]
    with (folder / "manifest.csv").open(encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if row["image"].startswith(("fig_", "pymatting_"))]
    pairs = []
    for row in rows:
        alpha = np.asarray(Image.open(folder / row["mask"]).convert("L"))
        pairs.append((extended(np.asarray(Image.open(folder / row["image"]).convert("RGB")), alpha), alpha))
    return pairs


@pytest.mark.parametrize("colour", [(255, 255, 255), (20, 190, 60), (40, 90, 220)])
def test_the_colour_error_of_photographs_is_halved(colour: tuple[int, int, int], shared_data: Path) -> None:
    before, after = [], []
    for subject, alpha in matted_photographs(shared_data / "photos"):
        image = mixed(subject, np.full_like(subject, colour), alpha)
        before.append(colour_error(image, subject, alpha))

        clean_edges(image, alpha)

        after.append(colour_error(image, subject, alpha))
        assert np.array_equal(image[alpha == 255], subject[alpha == 255])
    assert all(late <= early / 2 for early, late in zip(before, after, strict=True)), (before, after)
