"""The GPU as its driver sees it: how busy it is and how full. Nothing where NVML isn't there."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pynvml
import torch

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class GpuUse:
    """`busy`: share of the last moment in which a kernel ran, 0 to 1."""

    busy: float
    used_bytes: int
    total_bytes: int


class Gpu:
    """Finds the device by its UUID: NVML counts GPUs in another order than CUDA, and knows nothing of pinning."""

    def __init__(self, uuid: str) -> None:
        """Raises `pynvml.NVMLError`."""
        pynvml.nvmlInit()
        self._handle: Any = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")

    def use(self) -> GpuUse:
        """Raises `pynvml.NVMLError`, for one when the GPU has fallen off the bus."""
        memory = pynvml.nvmlDeviceGetMemoryInfo(self._handle)
        busy = pynvml.nvmlDeviceGetUtilizationRates(self._handle).gpu / 100
        return GpuUse(busy, int(memory.used), int(memory.total))


def find_gpu(device: torch.device) -> Gpu | None:
    """None for a CPU, and, said once in the log, where NVML does not answer."""
    if device.type != "cuda":
        return None
    try:
        gpu = Gpu(str(torch.cuda.get_device_properties(device).uuid))
        gpu.use()
    except pynvml.NVMLError as exc:
        log.warning("no GPU metrics: NVML says %s", exc, extra={"action": "start"})
        return None
    return gpu
