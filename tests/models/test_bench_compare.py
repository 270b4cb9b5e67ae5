"""Why the model card's script gives another alpha than ours for the same image and weights."""

from __future__ import annotations

import numpy as np
import torch

from jobs.recipe import Recipe
from tests.bench.compare import differences
from tests.bench.compare.__main__ import EQUAL, as_pixels, make_photo
from tests.bench.compare.recipe import MEAN, SIDE, STD, Model, cut_out, load_model
from tests.support.images import decode_image
from workers.imaging import pipeline
from workers.imaging.decode import Limits
from workers.imaging.pixels import Pixels


class ScriptModel:
    """The script's network as a `MaskPredictor`."""

    input_size = (SIDE, SIDE)

    def __init__(self, model: Model) -> None:
        self.model = model

    @torch.inference_mode()
    def predict(self, rgb: Pixels, *, live: bool = False) -> Pixels:
        x = (torch.from_numpy(rgb) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        return (self.model(x.permute(2, 0, 1)[None]).squeeze() * 255).round().to(torch.uint8).numpy()


def test_the_model_cards_script_differs_from_ours_only_by_its_mask_resizing() -> None:
    photo, model = make_photo(800, 1100), load_model(threads=1)
    ours = as_pixels(pipeline.cut_out(photo, Recipe(edges="off"), ScriptModel(model), limits=Limits()).cutout)

    cutout, mask = cut_out(photo, model)
    script = as_pixels(cutout)

    assert (
        differences.difference(differences.compute_alpha(photo, model, differences.CARD), script[..., 3]).max() <= EQUAL
    )
    assert differences.difference(script[..., 3], ours[..., 3]).max() > EQUAL
    assert (
        differences.difference(differences.compute_alpha(photo, model, differences.OURS), ours[..., 3]).max() <= EQUAL
    )
    visible = ours[..., 3] > 0
    assert visible.mean() > 0.1
    assert differences.difference(ours, script)[visible][:, :3].max() <= EQUAL
    assert np.array_equal(np.asarray(decode_image(mask)), script[..., 3])
