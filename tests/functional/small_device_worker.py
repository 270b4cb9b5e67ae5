"""A worker whose device, and nothing else, is a stand-in: its memory holds two images and no third."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import workers.models
from workers.__main__ import main
from workers.models import LoadedModel

HOLDS = 2


def load_on_a_small_device(*args: object, **options: object) -> LoadedModel:
    def forward(x: Tensor) -> Tensor:
        if len(x) > HOLDS:
            raise torch.OutOfMemoryError(f"{len(x)} images do not fit")
        return x.mean(dim=1, keepdim=True).sigmoid()

    return LoadedModel(
        name="small-device",
        revision="0" * 64,
        input_size=(64, 64),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        licence="none",
        device=torch.device("cpu"),
        dtype=torch.float32,
        forward=forward,
    )


if __name__ == "__main__":
    workers.models.load = load_on_a_small_device  # type: ignore[assignment]  # the stand-in has the same use
    sys.exit(main([]))
