"""Why the model card's script gives another alpha than ours, from the same image and weights."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from jobs.recipe import Recipe
from tests.bench.compare import apart
from tests.bench.compare.__main__ import EQUAL, as_pixels, make_photo
from tests.bench.compare.recipe import MEAN, SIDE, STD, Model, cut_out, load_model
from workers.imaging import pipeline
from workers.imaging.decode import Limits

Pixels = NDArray[np.uint8]


class Computed:
    """The script's own network, as a predictor of ours."""

    input_size = (SIDE, SIDE)

    def __init__(self, model: Model) -> None:
        self.model = model

    @torch.inference_mode()
    def predict(self, rgb: Pixels, *, live: bool = False) -> Pixels:
        x = (torch.from_numpy(rgb) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        return (self.model(x.permute(2, 0, 1)[None]).squeeze() * 255).round().to(torch.uint8).numpy()


def test_the_model_cards_script_has_our_alpha_and_colour_but_for_the_filter_that_enlarges_its_mask() -> None:
    photo, model = make_photo(800, 1100), load_model(threads=1)
    ours = as_pixels(pipeline.cut_out(photo, Recipe(edges="off"), Computed(model), limits=Limits()).cutout)

    cutout, mask = cut_out(photo, model)
    theirs = as_pixels(cutout)

    assert apart.grey_levels(apart.alpha_by(photo, model, apart.CARD), theirs[..., 3]).max() <= EQUAL
    assert apart.grey_levels(theirs[..., 3], ours[..., 3]).max() > EQUAL
    assert apart.grey_levels(apart.alpha_by(photo, model, apart.OURS), ours[..., 3]).max() <= EQUAL
    shown = ours[..., 3] > 0
    assert shown.mean() > 0.1
    assert apart.grey_levels(ours, theirs)[shown][:, :3].max() <= EQUAL
    assert np.array_equal(cv2.imdecode(np.frombuffer(mask, np.uint8), cv2.IMREAD_UNCHANGED), theirs[..., 3])
