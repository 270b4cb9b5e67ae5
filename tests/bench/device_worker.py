"""A worker with a stand-in device that takes a fixed time for each image and no processor time. Everything except the
model is the real worker.

    BENCH_DEVICE_MS=11 [BENCH_DEVICE_SIDE=1024] python -m tests.bench.device_worker
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import workers.serve
from tests.bench.image_path import SIDE, make_mask
from workers.__main__ import main
from workers.models import LoadedModel
from workers.models.batcher import Batcher

Image = NDArray[np.uint8]


class StandIn(Batcher):
    """A batcher whose forward pass only sleeps."""

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
    """Side of the model's input in pixels."""
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
    serve: Any = workers.serve  # untyped, because two of its parts are replaced
    serve.load, serve.Batcher = load_stand_in, StandIn
    sys.exit(main([]))
