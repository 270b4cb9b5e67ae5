"""Decode renditions from their bytes; check background, fill, size, profile, and the results of their rules."""

from __future__ import annotations

import datetime
import io
import json
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from jobs.recipe import Rendition, Rules, load_recipe
from workers.imaging.marketplace_rules import RuleResult
from workers.imaging.pixels import Pixels
from workers.imaging.renditions import Encoded, find_subject, render, render_all

Format = Literal["jpeg", "png", "webp"]
Box = tuple[int, int, int, int]
BOX = (150, 200, 550, 450)


def cutout(width: int = 900, height: int = 700, *, box: Box = BOX) -> tuple[Pixels, Pixels]:
    """A red subject with a soft edge in `box` (left, top, right, bottom), on transparent green."""
    alpha = np.zeros((height, width), np.uint8)
    alpha[box[1] : box[3], box[0] : box[2]] = 255
    alpha = np.asarray(cv2.GaussianBlur(alpha, (0, 0), 1.5), np.uint8)
    rgb = np.full((height, width, 3), (0, 200, 0), np.uint8)
    rgb[alpha > 0] = (200, 30, 40)
    return rgb, alpha


def rendered(rendition: Rendition, *, size: tuple[int, int] = (900, 700), box: Box = BOX) -> tuple[Encoded, Pixels]:
    rgb, alpha = cutout(*size, box=box)
    subject = find_subject(alpha)
    assert subject is not None
    encoded = render(rgb, alpha, rendition, subject=subject)
    with Image.open(io.BytesIO(encoded.body)) as image:
        return encoded, np.asarray(image)


def extent(marked: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the marked pixels."""
    columns, rows = np.flatnonzero(marked.any(0)), np.flatnonzero(marked.any(1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def is_subject(pixels: Pixels) -> NDArray[np.bool_]:
    """Red, with an alpha of at least one half."""
    return np.asarray(pixels[..., 1] < 128)


@pytest.mark.parametrize("format_", ["jpeg", "png", "webp"])
def test_a_square_has_a_centred_subject_its_fill_and_an_exactly_white_background(format_: Format) -> None:
    rendition = Rendition(
        name="shop",
        format=format_,
        canvas="square",
        fill=0.8,
        lossless=format_ == "webp",
    )

    encoded, pixels = rendered(rendition)

    left, top, right, bottom = extent(is_subject(pixels))
    side = pixels.shape[0]
    assert pixels.shape == (side, side, 3)
    assert (right - left) / side == pytest.approx(0.8, abs=0.01)
    assert abs(left - (side - right)) <= 2 and abs(top - (side - bottom)) <= 2
    away = np.ones((side, side), bool)
    away[top - 24 : bottom + 24, left - 24 : right + 24] = False
    assert away.any() and (pixels[away] == 255).all()
    assert encoded.content_type == f"image/{format_}"


def test_a_background_of_any_colour_is_exact_outside_the_soft_edge() -> None:
    _, pixels = rendered(Rendition(name="a", format="png", background="#1e90ff"))

    assert (pixels[:150] == (0x1E, 0x90, 0xFF)).all()
    assert (pixels[320, 300] == (200, 30, 40)).all()
    assert not (pixels == (0, 200, 0)).all(-1).any(), "no pixel of the old background remains"


def test_min_px_enlarges_the_subject_up_to_max_upscale() -> None:
    _, free = rendered(Rendition(name="a", canvas="square", fill=0.8, min_px=800, max_upscale=4))
    _, bound = rendered(Rendition(name="a", canvas="square", fill=0.8, min_px=2000, max_upscale=1.5))

    assert free.shape[0] == 800
    assert bound.shape[0] == 2000
    left, _, right, _ = extent(is_subject(bound))
    assert right - left == pytest.approx(400 * 1.5, abs=6)


def test_max_px_shrinks_the_rendition() -> None:
    _, pixels = rendered(Rendition(name="a", format="png", canvas="square", fill=0.8, max_px=200))

    assert pixels.shape == (200, 200, 3)
    left, _, right, _ = extent(is_subject(pixels))
    assert (right - left) / 200 == pytest.approx(0.8, abs=0.015)
    assert (pixels[:20] == 255).all()


def test_trim_crops_to_the_subject_with_its_margin() -> None:
    _, tight = rendered(Rendition(name="a", format="png", canvas="trim", background="transparent"))
    _, wide = rendered(Rendition(name="a", format="png", canvas="trim", background="transparent", margin=0.1))

    assert tight[..., 3].any(0).all() and tight[..., 3].any(1).all()
    margin = round(0.1 * tight.shape[1])
    assert wide.shape[:2] == (tight.shape[0] + 2 * margin, tight.shape[1] + 2 * margin)
    assert np.array_equal(wide[margin:-margin, margin:-margin], tight)


def test_a_margin_beyond_the_source_is_transparent() -> None:
    _, pixels = rendered(Rendition(name="a", format="png", canvas="trim", background="transparent", margin=1.0))

    assert pixels.shape[1] > 900
    assert not pixels[:, :100].any()


@pytest.mark.parametrize("max_px", [0, 300])
def test_a_transparent_rendition_has_no_fringe(max_px: int) -> None:
    _, pixels = rendered(Rendition(name="a", format="png", background="transparent", max_px=max_px))

    visible = pixels[..., 3] > 8
    assert np.abs(pixels[visible][:, :3].astype(int) - (200, 30, 40)).max() <= 8
    assert not pixels[pixels[..., 3] == 0].any()


def test_lossless_webp_keeps_colour_and_alpha() -> None:
    encoded, pixels = rendered(Rendition(name="a", format="webp", background="transparent", lossless=True))

    rgb, alpha = cutout()
    assert np.array_equal(pixels[..., 3], alpha)
    assert np.array_equal(pixels[alpha == 255][:, :3], rgb[alpha == 255])
    assert encoded.body[8:12] == b"WEBP"


@pytest.mark.parametrize("format_", ["jpeg", "webp"])
def test_jpeg_and_webp_have_an_srgb_profile_and_no_exif(format_: Format) -> None:
    encoded, _ = rendered(Rendition(name="a", format=format_))

    with Image.open(io.BytesIO(encoded.body)) as image:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        assert "sRGB" in ImageCms.getProfileDescription(profile)
        assert profile.profile.creation_date == datetime.datetime(2026, 1, 1), "every worker writes the same bytes"
        assert not dict(image.getexif())


@pytest.mark.parametrize("format_", ["jpeg", "webp", "png"])
def test_credit_is_stored_in_the_rendition(format_: Format) -> None:
    rgb, alpha = cutout()
    credit = (("artist", "Ü. Müller"), ("copyright", "© 版权"))

    body = render_all(
        rgb,
        alpha,
        (Rendition(name="a", format=format_),),
        credit=credit,
    )["a"].body

    with Image.open(io.BytesIO(body)) as image:
        image.load()
        if format_ == "png":
            assert image.info["Artist"] == "Ü. Müller" and image.info["Copyright"] == "© 版权"
        else:
            assert len(dict(image.getexif())) == 2


def test_an_image_without_a_subject_has_no_rendition() -> None:
    rgb, alpha = cutout()

    assert render_all(rgb, np.zeros_like(alpha), (Rendition(name="a"),)) == {}


def verdicts(checks: tuple[RuleResult, ...]) -> dict[str, str]:
    return {check.name: check.verdict for check in checks}


@pytest.mark.parametrize("name", ["amazon-main", "google-shopping", "ebay", "shopify", "walmart"])
def test_a_good_image_passes_the_rules_of_every_marketplace(name: str) -> None:
    (rendition,) = load_recipe(name).renditions

    encoded, pixels = rendered(rendition, size=(2400, 2000), box=(300, 250, 2000, 1800))

    assert set(verdicts(encoded.checks).values()) == {"pass"}, encoded.checks
    assert pixels.shape[0] == pixels.shape[1] >= rendition.min_px
    assert len(encoded.body) < 3e6


def test_a_failed_rule_has_the_measured_value() -> None:
    rules = Rules(min_px=5000, max_mb=0.001, min_fill=0.9, exact_background=True)
    rendition = Rendition(name="a", canvas="square", fill=0.5, rules=rules)

    encoded, _ = rendered(rendition)

    found = verdicts(encoded.checks)
    assert found == {
        "format": "pass",
        "colour_space": "pass",
        "pixels": "fail",
        "megabytes": "fail",
        "fill": "fail",
        "background": "pass",
    }
    assert {check.name: check.value for check in encoded.checks}["pixels"] == "808"


def test_fewer_pixels_than_advised_are_a_warning() -> None:
    rendition = Rendition(name="a", canvas="square", rules=Rules(min_px=100, advised_px=4000))

    assert verdicts(rendered(rendition)[0].checks)["pixels"] == "warn"


def test_a_background_that_is_not_exact_fails() -> None:
    rgb, alpha = cutout()
    hazy = np.maximum(alpha, 2)
    rendition = Rendition(name="a", format="png", rules=Rules(exact_background=True))
    subject = find_subject(alpha)
    assert subject is not None

    exact = render(rgb, alpha, rendition, subject=subject)
    inexact = render(rgb, hazy, rendition, subject=subject)

    assert verdicts(exact.checks)["background"] == "pass"
    assert verdicts(inexact.checks)["background"] == "fail"


GOLDEN = Path(__file__).parent / "golden"
MARKETPLACES = ("amazon-main", "google-shopping", "ebay", "shopify", "walmart")


def golden(name: str) -> tuple[str, Image.Image]:
    """Properties of a marketplace's rendition, as JSON, and the rendition at 64 x 64 pixels."""
    (rendition,) = load_recipe(name).renditions
    rgb, alpha = cutout(1300, 1000, box=(200, 150, 1000, 800))
    y, x = np.mgrid[0:1000, 0:1300]
    rgb[..., 1] = (x // 8) % 256
    rgb[..., 2] = (y // 4) % 256
    subject = find_subject(alpha)
    assert subject is not None
    encoded = render(rgb, alpha, rendition, subject=subject)
    with Image.open(io.BytesIO(encoded.body)) as image:
        properties = {"format": image.format, "mode": image.mode, "size": image.size, "checks": encoded.findings}
        return json.dumps(properties), image.convert("RGB").resize((64, 64), Image.Resampling.BOX)


@pytest.mark.parametrize("name", MARKETPLACES)
def test_the_rendition_for_a_marketplace_is_the_golden_one(name: str) -> None:
    """If this fails on purpose: increase `PIPELINE_VERSION` if pixels have changed, look at the new image, and write
    the golden files with `PYTHONPATH=. python tests/unit/test_encode_renditions.py`.
    """
    with Image.open(GOLDEN / f"{name}.png") as before:
        properties, now = golden(name)

        assert without_file_size(before.info["properties"]) == without_file_size(properties)
        difference = np.abs(np.asarray(before).astype(int) - np.asarray(now).astype(int))
    assert difference.max() <= 2, "processors and libraries round differently"


def without_file_size(properties: str) -> dict[str, Any]:
    """The size of a JPEG depends on the version of libjpeg."""
    fields: dict[str, Any] = json.loads(properties)
    return fields | {"checks": [check for check in fields["checks"] if check[0] != "megabytes"]}


if __name__ == "__main__":
    for name in MARKETPLACES:
        properties, image = golden(name)
        info = PngInfo()
        info.add_text("properties", properties)
        image.save(GOLDEN / f"{name}.png", pnginfo=info)
