"""Cut out an image with all stages real but the model."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from jobs.recipe import PIPELINE_VERSION, Recipe, Rendition
from workers.imaging.decode import DecodedImage, Limits, decode_image
from workers.imaging.pipeline import combine_alpha, cut_out
from workers.imaging.pixels import Pixels
from workers.imaging.resize import enlarge, shrink
from workers.models import LoadedModel, load
from workers.models.batcher import Batcher

GOLDEN = Path(__file__).parent / "golden" / f"cutout-v{PIPELINE_VERSION}.png"


class RedIsSubject:
    """Returns the red channel as mask, and records its calls."""

    input_size = (32, 48)

    def __init__(self) -> None:
        self.calls: list[tuple[Pixels, bool]] = []

    def predict(self, rgb: Pixels, *, live: bool = False) -> Pixels:
        self.calls.append((rgb, live))
        return np.ascontiguousarray(rgb[..., 0])


def red_square(width: int = 120, height: int = 80) -> Pixels:
    rgb = np.full((height, width, 3), (0, 90, 40), np.uint8)
    rgb[height // 4 : -height // 4, width // 4 : -width // 4] = (255, 20, 30)
    return rgb


def png(pixels: Pixels) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def pixels_of(data: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_an_image_becomes_a_cutout_and_a_mask_of_its_own_size() -> None:
    rgb = red_square()

    outputs = cut_out(png(rgb), Recipe(edges="off"), RedIsSubject(), limits=Limits())

    cutout, mask = pixels_of(outputs.cutout), pixels_of(outputs.mask)
    assert (outputs.width, outputs.height) == (120, 80)
    assert cutout.shape == (80, 120, 4) and mask.shape == (80, 120)
    assert np.array_equal(cutout[..., 3], mask)
    assert np.array_equal(cutout[mask > 0, :3], rgb[mask > 0])
    assert mask[40, 60] == 255 and mask[2, 2] == 0
    assert set(outputs.seconds) == {"decode", "device", "encode"}


def test_colour_is_zero_where_alpha_is_zero() -> None:
    cutout = pixels_of(cut_out(png(red_square()), Recipe(edges="off"), RedIsSubject(), limits=Limits()).cutout)

    assert not cutout[cutout[..., 3] == 0].any()


def test_the_predictor_gets_a_small_image_and_whether_it_is_live() -> None:
    predictor = RedIsSubject()

    cut_out(png(red_square()), Recipe(), predictor, limits=Limits(), live=True)

    ((rgb, live),) = predictor.calls
    assert rgb.shape == (32, 48, 3)
    assert live


def test_another_decoder_can_be_passed() -> None:
    calls: list[str] = []

    def decode(data: bytes, *, limits: Limits, animation: str) -> DecodedImage:
        calls.append(animation)
        return decode_image(data, limits=limits, animation="first")

    cut_out(png(red_square()), Recipe(animation="refuse"), RedIsSubject(), limits=Limits(), decode=decode)

    assert calls == ["refuse"]


@pytest.mark.parametrize("shape", [(1250, 1600), (1, 10_000), (1, 1), (7, 7), (333, 5)])
def test_shrinking_is_pillows_bilinear(shape: tuple[int, int]) -> None:
    rgb = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)

    ours = shrink(rgb, (32, 48))

    theirs = np.asarray(Image.fromarray(rgb).resize((48, 32), Image.Resampling.BILINEAR))
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


@pytest.mark.parametrize("shape", [(200, 300), (5, 300), (200, 7), (1, 1), (32, 48)])
def test_enlarging_is_pillows_bilinear(shape: tuple[int, int]) -> None:
    mask = np.random.default_rng(2).integers(0, 256, (32, 48), np.uint8)

    ours = enlarge(mask, shape)

    theirs = np.asarray(Image.fromarray(mask).resize(shape[::-1], Image.Resampling.BILINEAR))
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def test_the_sources_alpha_is_multiplied_with_the_mask_or_kept() -> None:
    mask = np.array([[255, 128, 0, 255]], np.uint8)
    own = np.array([[128, 128, 255, 0]], np.uint8)

    assert combine_alpha(mask, own, Recipe(alpha="multiply")).tolist() == [[128, 64, 0, 0]]
    assert combine_alpha(mask, own, Recipe(alpha="keep")).tolist() == own.tolist()
    assert combine_alpha(mask, None, Recipe(alpha="keep")).tolist() == mask.tolist()


def test_a_source_with_alpha_keeps_its_own_colours_at_the_edge() -> None:
    rgba = np.dstack([red_square(), np.full((80, 120), 255, np.uint8)])
    rgba[:, :60, 3] = 100

    cutout = pixels_of(cut_out(png(rgba), Recipe(edges="estimate"), RedIsSubject(), limits=Limits()).cutout)

    assert np.array_equal(cutout[cutout[..., 3] > 0][:, :3], rgba[cutout[..., 3] > 0][:, :3])
    assert cutout[40, 45, 3] == 100


def test_the_model_sees_transparent_pixels_as_white() -> None:
    predictor = RedIsSubject()
    rgba = np.zeros((80, 120, 4), np.uint8)
    rgba[20:60, 30:90] = (255, 20, 30, 255)

    cut_out(png(rgba), Recipe(), predictor, limits=Limits())

    assert (predictor.calls[0][0][0, 0] == 255).all()


def test_ignored_alpha_has_no_effect() -> None:
    rgba = np.dstack([red_square(), np.full((80, 120), 7, np.uint8)])

    mask = pixels_of(cut_out(png(rgba), Recipe(alpha="ignore"), RedIsSubject(), limits=Limits()).mask)

    assert mask[40, 60] == 255


def test_an_image_without_a_subject_has_no_renditions() -> None:
    recipe = Recipe(renditions=(Rendition(name="shop", canvas="square"),))
    black = np.zeros((80, 120, 3), np.uint8)

    full = cut_out(png(red_square()), recipe, RedIsSubject(), limits=Limits())
    empty = cut_out(png(black), recipe, RedIsSubject(), limits=Limits())

    assert pixels_of(full.renditions["shop"].body).shape[2] == 3
    assert empty.renditions == {} and "empty" in empty.review
    assert not pixels_of(empty.cutout).any()


def test_provenance_is_stored_in_the_cutout_and_notes_are_returned() -> None:
    data = io.BytesIO()
    Image.fromarray(red_square()).save(data, "PNG", icc_profile=b"broken")

    outputs = cut_out(data.getvalue(), Recipe(), RedIsSubject(), limits=Limits(), text={"Source": "abc"})

    assert outputs.notes[0].startswith("icc_profile_ignored")
    with Image.open(io.BytesIO(outputs.cutout)) as image:
        image.load()
        assert image.info["Source"] == "abc"


def golden_input() -> bytes:
    """Soft, coloured and of odd size, so that every stage changes pixels."""
    y, x = np.mgrid[0:97, 0:131].astype(np.float32)
    red = 255 * np.clip(1.6 - np.hypot(x - 60, y - 50) / 28, 0, 1)
    return png(np.stack([red, 60 + x, 200 - y], axis=-1).astype(np.uint8))


def test_a_recipe_gives_the_pixels_of_its_pipeline_version() -> None:
    """If this fails, pixels have changed. Increase `PIPELINE_VERSION`, so that old outputs are not taken for new ones,
    and write the new golden file with `PYTHONPATH=. python tests/models/test_pipeline.py`.
    """
    assert GOLDEN.is_file(), f"no golden file for pipeline version {PIPELINE_VERSION}"
    before = np.asarray(Image.open(io.BytesIO(GOLDEN.read_bytes()))).astype(int)

    now = pixels_of(cut_out(golden_input(), Recipe(), RedIsSubject(), limits=Limits()).cutout).astype(int)

    assert np.abs(now - before).max() <= 1, "processors round floats differently, by one level"
    assert np.abs(now - before).mean() < 0.01


PHOTOS = Path(os.environ.get("CUTFLEET_TEST_DATA", Path(__file__).parents[3] / "shared")) / "photos"


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="no photographs in CUTFLEET_TEST_DATA")
def test_masks_agree_with_the_script_of_the_model_card() -> None:
    """The script: Pillow bilinear, ToTensor, Normalize, the model, Pillow to full size."""
    model = load("u2netp")
    files = sorted(file for file in PHOTOS.iterdir() if file.suffix in (".jpg", ".png") and ".mask" not in file.name)

    with Batcher(model, batch_limit=1) as batcher:
        for file in files[::6]:
            data = file.read_bytes()
            ours = pixels_of(cut_out(data, Recipe(), batcher, limits=Limits()).mask)

            assert np.abs(ours.astype(int) - card_mask(data, model)).mean() <= 1.0, file.name


def card_mask(data: bytes, model: LoadedModel) -> NDArray[np.int_]:
    with Image.open(io.BytesIO(data)) as image:
        rgb = image.convert("RGB")
    small = rgb.resize(model.input_size[::-1], Image.Resampling.BILINEAR)
    x = torch.from_numpy(np.asarray(small, np.float32) / 255).permute(2, 0, 1)
    x = (x - torch.tensor(model.mean).view(3, 1, 1)) / torch.tensor(model.std).view(3, 1, 1)
    with torch.inference_mode():
        alpha = model(x[None])[0, 0].numpy()
    mask = Image.fromarray((alpha * 255).astype(np.uint8)).resize(rgb.size)
    return np.asarray(mask).astype(int)


if __name__ == "__main__":
    GOLDEN.write_bytes(cut_out(golden_input(), Recipe(), RedIsSubject(), limits=Limits()).cutout)
