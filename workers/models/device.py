"""Where and how exactly a model computes. float32 is float32: TF32 stays off, whoever wants speed takes float16."""

from __future__ import annotations

import logging

import torch
from torch import nn

from jobs.errors import ModelError

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is any; asking for `cuda` without a GPU raises `ModelError` (`no_gpu`)."""
    if name not in ("auto", "cpu", "cuda"):
        raise ModelError(f"CUTFLEET_DEVICE is {name!r}; it must be auto, cpu or cuda.", code="no_gpu")
    if name == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if name == "cuda":
        raise ModelError(
            "CUTFLEET_DEVICE is cuda and torch sees no GPU. Check the driver and CUTFLEET_GPU, or set it to cpu.",
            code="no_gpu",
        )
    logger.warning("No GPU is visible to torch: the model runs on the CPU.")
    return torch.device("cpu")


def resolve_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """None or `auto`: float16 on a GPU, float32 on a CPU."""
    if name in (None, "auto"):
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ModelError(f"CUTFLEET_DTYPE is {name!r}; it must be auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def place(network: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The network for inference, on the device, channels last."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    network = network.eval().requires_grad_(False).to(device=device, dtype=dtype)
    return network.to(memory_format=torch.channels_last)


def describe_device(device: torch.device) -> str:
    """For the start line: the GPU's name and memory, or the CPU's threads."""
    if device.type != "cuda":
        return f"CPU, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
