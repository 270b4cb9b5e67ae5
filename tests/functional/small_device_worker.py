"""A worker whose device is a stand-in: its memory holds a batch of two images."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

import workers.serve
from workers.__main__ import main
from workers.models import LoadedModel

MAX_BATCH = 2


def load_on_a_small_device(*args: object, **options: object) -> LoadedModel:
    def forward(x: Tensor) -> Tensor:
        if len(x) > MAX_BATCH:
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
    serve: Any = workers.serve  # untyped, because one of its functions is replaced
    serve.load = load_on_a_small_device
    sys.exit(main([]))
