"""Metrics of a worker's device: batches, and a GPU that stops answering."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pynvml
import torch

from workers.process.metrics import WorkerMetrics
from workers.process.nvml import Gpu, GpuUse, find_gpu

BATCHER = SimpleNamespace(batch_sizes={2: 1, 8: 1, 3: 2}, device_s=1.5, batch_limit=8, waiting=3)


class FakeGpu(Gpu):
    """A GPU that NVML answers for until it is lost."""

    def __init__(self) -> None:
        self.is_lost = False

    def use(self) -> GpuUse:
        if self.is_lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return GpuUse(0.75, 10, 80)


def observe(metrics: WorkerMetrics, gpu: FakeGpu) -> None:
    model = SimpleNamespace(name="u2netp", revision="abc", device=torch.device("cuda"), dtype=torch.float16)
    leases = SimpleNamespace(in_flight=lambda: 5)
    parts = (model, BATCHER, leases)
    metrics.observe(*parts, gpu=gpu, slots=24, draining=threading.Event())  # type: ignore[arg-type]  # only their figures


def test_a_lost_gpu_hides_no_other_metric() -> None:
    gpu = FakeGpu()
    metrics = WorkerMetrics()
    observe(metrics, gpu)
    value = metrics.registry.get_sample_value
    assert value("cutfleet_gpu_busy_ratio") == 0.75

    gpu.is_lost = True

    assert value("cutfleet_gpu_busy_ratio") is None
    assert value("cutfleet_images_in_flight") == 5
    assert value("cutfleet_batch_images_sum") == 16


def test_batch_sizes_are_a_histogram() -> None:
    metrics = WorkerMetrics()
    observe(metrics, FakeGpu())

    (family,) = (family for family in metrics.registry.collect() if family.name == "cutfleet_batch_images")

    counts = {sample.labels["le"]: sample.value for sample in family.samples if sample.name.endswith("_bucket")}
    assert counts == {"1.0": 0, "2.0": 1, "4.0": 3, "8.0": 4, "16.0": 4, "32.0": 4, "64.0": 4, "+Inf": 4}
    assert metrics.registry.get_sample_value("cutfleet_batch_images_count") == 4


def test_a_cpu_has_no_gpu_metrics() -> None:
    assert find_gpu(torch.device("cpu")) is None
