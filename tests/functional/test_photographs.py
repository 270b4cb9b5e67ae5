"""Photographs through the whole system, compared with the model card's script and with ground truth."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from jobs.s3.client import Store
from producer.demo.local_stack import LocalStack
from tests.support.environment import ROOT, Run
from tests.support.images import decode_image
from tests.support.places import Places, fetch_output
from workers.imaging.pixels import Pixels
from workers.models import load

SAMPLES = ROOT / "producer/demo/samples"
MEAN_DIFFERENCE = 1.0
"""Mean difference of an image in grey levels; our resizing gives 0.2 to 0.65."""
MEAN_IOU = 0.80
"""u2netp on these photographs; the README states the exact figure."""


def ground_truths(folder: Path) -> dict[str, Path]:
    if not (folder / "manifest.csv").exists():
        return {}
    with (folder / "manifest.csv").open() as rows:
        return {row["image"]: folder / row["mask"] for row in csv.DictReader(rows)}


def model_card_mask(path: Path) -> Pixels:
    """Return the mask of the model card's script: resized by Pillow, normalised, resized back by Pillow."""
    model = load("u2netp")
    image = Image.open(path).convert("RGB")
    prepare = transforms.Compose(
        [
            transforms.Resize(model.input_size),
            transforms.ToTensor(),
            transforms.Normalize(model.mean, model.std),
        ]
    )
    with torch.inference_mode():
        alpha = model(prepare(image)[None])[0, 0]
    return np.asarray(transforms.ToPILImage()(alpha).resize(image.size))


@pytest.mark.timeout(400)
def test_masks_of_photographs_match_the_model_cards_script(
    fleet: LocalStack, cutfleet: Run, store: Store, places: Places, shared_data: Path
) -> None:
    truths = ground_truths(shared_data / "photos")
    paths = [shared_data / "photos" / name for name in truths] or sorted(SAMPLES.iterdir())
    for path in paths:
        store.put(places.key(path.name), path.read_bytes(), content_type="image/*")

    ran = cutfleet("submit", places.source, "--to", places.to, "--wait", timeout_s=350)

    job = json.loads(cutfleet("status", ran.stdout.strip(), "--json").stdout)
    assert (ran.returncode, job["done"], job["failed"]) == (0, len(paths), 0)
    overlaps = []
    for path in paths:
        mask = np.asarray(decode_image(fetch_output(store, places.mask(path.name))))
        difference = np.abs(mask.astype(float) - model_card_mask(path)).mean()
        assert difference <= MEAN_DIFFERENCE, path.name
        if path.name in truths:
            truth = np.asarray(Image.open(truths[path.name]).convert("L")) >= 128
            found = mask >= 128
            overlaps.append((found & truth).sum() / max(1, (found | truth).sum()))
    if overlaps:
        print(f"mean IoU at 0.5 on {len(overlaps)} photographs: {np.mean(overlaps):.3f}")
        assert np.mean(overlaps) >= MEAN_IOU
    assert store.head(places.cutout(paths[0].name), role="output") is not None
