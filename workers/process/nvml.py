"""Load and memory of the GPU, from its driver (NVML)."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pynvml
import torch

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class GpuUse:
    """`busy`: share of the last sampling period in which a kernel ran, 0 to 1. Memory of all processes."""

    busy: float
    used_bytes: int
    total_bytes: int


class Gpu:
    """Finds the device by its UUID: NVML counts GPUs in another order than CUDA and ignores CUDA_VISIBLE_DEVICES."""

    def __init__(self, uuid: str) -> None:
        """Raises `pynvml.NVMLError`."""
        pynvml.nvmlInit()
        self._handle: Any = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")

    def use(self) -> GpuUse:
        """Raises `pynvml.NVMLError`, for example when the GPU has fallen off the bus."""
        memory = pynvml.nvmlDeviceGetMemoryInfo(self._handle)
        busy = pynvml.nvmlDeviceGetUtilizationRates(self._handle).gpu / 100
        return GpuUse(busy, int(memory.used), int(memory.total))


def find_gpu(device: torch.device) -> Gpu | None:
    """Return None for a CPU, and with a warning if NVML does not answer."""
    if device.type != "cuda":
        return None
    try:
        gpu = Gpu(str(torch.cuda.get_device_properties(device).uuid))
        gpu.use()
    except pynvml.NVMLError as exc:
        log.warning("no GPU metrics: NVML failed: %s", exc, extra={"action": "start"})
        return None
    return gpu
