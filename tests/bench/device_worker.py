"""A worker whose device is a stand-in that takes a fixed time for each image, whatever is in it, and no processor
time at all: what remains is everything that is not the model. All else is the worker as it ships.

    BENCH_DEVICE_MS=11 [BENCH_DEVICE_SIDE=1024] python -m tests.bench.device_worker
"""

from __future__ import annotations

import os
import sys
import time

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import workers.models
import workers.models.batcher
from tests.bench.image_path import SIDE, make_mask
from workers.__main__ import main
from workers.models import LoadedModel
from workers.models.batcher import Predictor

Image = NDArray[np.uint8]


class StandIn(Predictor):
    """Gathers and answers as the real one does; only the forward pass is a pause."""

    def __init__(self, model: LoadedModel, *, batch_limit: int) -> None:
        self.image_s = device_ms() / 1000
        self.mask = make_mask()[:: SIDE // device_side(), :: SIDE // device_side()].copy()
        super().__init__(model, batch_limit=batch_limit)

    def _forward(self, rgb: Image, size: int) -> list[Image | None]:
        if self.image_s:
            time.sleep(self.image_s * size)
        return [self.mask] * size


def device_ms() -> float:
    return float(os.environ["BENCH_DEVICE_MS"])


def device_side() -> int:
    """Of what the model takes."""
    return int(os.environ.get("BENCH_DEVICE_SIDE", SIDE))


def load_stand_in(*args: object, **options: object) -> LoadedModel:
    def forward(x: Tensor) -> Tensor:
        raise AssertionError("the stand-in computes nothing")

    return LoadedModel(
        name=f"stand-in-{device_ms():g}ms",
        revision="0" * 64,
        input_size=(device_side(), device_side()),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        licence="none",
        device=torch.device("cpu"),
        dtype=torch.float32,
        forward=forward,
    )


if __name__ == "__main__":
    workers.models.load = load_stand_in  # type: ignore[assignment]  # the stand-in has the same use
    workers.models.batcher.Predictor = StandIn  # type: ignore[misc]  # as above
    sys.exit(main([]))
