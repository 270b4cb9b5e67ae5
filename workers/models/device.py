"""Choose device, precision and threads. float32 means float32: TF32 stays off, and float16 is the fast precision."""

from __future__ import annotations

import logging

import cv2
import torch
from torch import nn

from jobs.errors import ModelError

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve_device(name: str) -> torch.device:
    """Return the device of a setting: `auto` is CUDA if torch sees a GPU, else the CPU.

    Raises `ModelError` (`no_gpu`) for `cuda` without a GPU and for any other name.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ModelError(f"CUTFLEET_DEVICE is {name!r}; it must be auto, cpu or cuda.", code="no_gpu")
    if name == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if name == "cuda":
        raise ModelError(
            "CUTFLEET_DEVICE is cuda, but torch sees no GPU. Check the driver and CUTFLEET_GPU, or set "
            "CUTFLEET_DEVICE=cpu.",
            code="no_gpu",
        )
    logger.warning("No GPU is visible to torch: the model runs on the CPU.")
    return torch.device("cpu")


def resolve_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Return the precision of a setting. None or `auto` is float16 on a GPU, float32 on a CPU."""
    if name in (None, "auto"):
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ModelError(f"CUTFLEET_DTYPE is {name!r}; it must be auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def place(network: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Move the network to the device for inference, channels last."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    network = network.eval().requires_grad_(False).to(device=device, dtype=dtype)
    return network.to(memory_format=torch.channels_last)


def limit_threads(torch_threads: int) -> None:
    """Let OpenCV use one thread, since a worker computes several images at once. `torch_threads`: for a model on the
    CPU; 1 if the device is a GPU. Call once per process, before the first image.
    """
    cv2.setNumThreads(1)
    torch.set_num_threads(torch_threads)


def describe_device(device: torch.device) -> str:
    """Return the GPU's name and memory, or the CPU's threads."""
    if device.type != "cuda":
        return f"CPU, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
