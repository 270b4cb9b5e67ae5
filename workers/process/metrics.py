"""Prometheus metrics of a worker, beside those of `jobs/metrics.py`. They cost about ten microseconds per image.

cutfleet_images_total{outcome, lane}            deliveries by outcome: done, review, skipped, failed, deferred (a retry
                                                is scheduled), released (no attempt used up), blamed (a process ended,
                                                perhaps because of the image), later (for a newer worker); not claimed:
                                                cancelled, suspect, busy, taken, final, gone; stale (lease lost)
cutfleet_image_errors_total{outcome, code}      errors of these outcomes by code
cutfleet_queue_wait_seconds{lane}               histogram: from publishing to the claim, by the Redis server's clock
cutfleet_stage_seconds{stage}                   histogram: fetch, decode, device (including the wait for it), encode,
                                                publish
cutfleet_images_in_flight, cutfleet_slots       images claimed now, and their limit
cutfleet_batch_images                           histogram: images in one device batch
cutfleet_batch_limit_images                     largest batch; falls when the device runs out of memory
cutfleet_device_busy_seconds_total              its rate is the share of time in which the device computes
cutfleet_device_waiting_images                  submitted to the device and not computed yet
cutfleet_draining                               1 while the worker drains
cutfleet_model_info{model, revision, device, dtype}   1
cutfleet_gpu_busy_ratio, cutfleet_gpu_memory_used_bytes, cutfleet_gpu_memory_total_bytes   from NVML, if available
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import pynvml
from prometheus_client import Counter, Gauge, Histogram, Info
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from jobs.errors import CutfleetError
from jobs.ledger.window import Claim, ClaimOutcome
from jobs.message import LANES, Lane
from jobs.metrics import Metrics
from workers.models import LoadedModel
from workers.models.batcher import Batcher
from workers.process.leases import Leases
from workers.process.nvml import Gpu
from workers.process.task_outcome import TaskOutcome

INITIAL_OUTCOMES = (TaskOutcome.DONE, TaskOutcome.REVIEW, TaskOutcome.SKIPPED, TaskOutcome.FAILED)
"""Exposed at 0 from the start: Prometheus ignores the first value of a series."""
STAGE_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
WAIT_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600, 14_400, 86_400)
"""A live image waits for seconds, a backfill image as long as its window is deep."""
BATCH_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


class WorkerMetrics(Metrics):
    def __init__(self) -> None:
        super().__init__()
        self._images = Counter(
            "cutfleet_images", "Deliveries of images by outcome.", ["outcome", "lane"], registry=self.registry
        )
        for outcome, lane in itertools.product(INITIAL_OUTCOMES, LANES):
            self._images.labels(outcome, lane)
        self._errors = Counter(
            "cutfleet_image_errors",
            "Errors of images by outcome and code.",
            ["outcome", "code"],
            registry=self.registry,
        )
        self._waits = Histogram(
            "cutfleet_queue_wait_seconds",
            "Time from publishing to the claim.",
            ["lane"],
            buckets=WAIT_BUCKETS_S,
            registry=self.registry,
        )
        self._stages = Histogram(
            "cutfleet_stage_seconds",
            "Wall time of each stage of an image.",
            ["stage"],
            buckets=STAGE_BUCKETS_S,
            registry=self.registry,
        )

    def count_claim(self, claim: Claim, lane: Lane) -> None:
        """Count the outcome of an image that was not claimed, or the time that a claimed one waited."""
        if claim.outcome is not ClaimOutcome.GO:
            self._images.labels(claim.outcome, lane).inc()
        elif claim.waited_s is not None:
            self._waits.labels(lane).observe(claim.waited_s)

    @contextmanager
    def time_stage(self, name: str) -> Iterator[None]:
        """Time the block unless it raises: times of failures would hide among those of successes."""
        started = time.perf_counter()
        yield
        self._stages.labels(name).observe(time.perf_counter() - started)

    def observe_stages(self, seconds: Mapping[str, float]) -> None:
        """`seconds`: by stage, as `cut_out` measures them."""
        for name, value in seconds.items():
            self._stages.labels(name).observe(value)

    def count_outcome(self, lane: str, outcome: TaskOutcome, error: CutfleetError | None = None) -> None:
        """`error`: of an image that failed, was released or is retried."""
        self._images.labels(outcome, lane).inc()
        if error is not None:
            self._errors.labels(outcome, error.code).inc()

    def observe(
        self,
        model: LoadedModel,
        batcher: Batcher,
        leases: Leases,
        *,
        gpu: Gpu | None,
        slots: int,
        draining: threading.Event,
    ) -> None:
        """Expose the current figures of these parts from now on."""
        info = Info("cutfleet_model", "Model that this worker serves.", registry=self.registry)
        dtype = str(model.dtype).removeprefix("torch.")
        info.info({"model": model.name, "revision": model.revision, "device": str(model.device), "dtype": dtype})
        Gauge("cutfleet_slots", "Limit of images in flight.", registry=self.registry).set(slots)
        self.registry.register(_Gauges(batcher, leases, gpu, draining))


class _Gauges(Collector):
    def __init__(self, batcher: Batcher, leases: Leases, gpu: Gpu | None, draining: threading.Event) -> None:
        self._batcher = batcher
        self._leases = leases
        self._gpu = gpu
        self._draining = draining

    def collect(self) -> Iterable[Metric]:
        batcher = self._batcher
        yield GaugeMetricFamily("cutfleet_images_in_flight", "Images claimed now.", self._leases.in_flight())
        yield GaugeMetricFamily("cutfleet_draining", "1 while the worker drains.", int(self._draining.is_set()))
        yield _batches(batcher.batch_sizes)
        yield GaugeMetricFamily("cutfleet_batch_limit_images", "Most images in one batch.", batcher.batch_limit)
        yield CounterMetricFamily("cutfleet_device_busy_seconds", "Seconds in the model.", batcher.device_s)
        yield GaugeMetricFamily("cutfleet_device_waiting_images", "Images that wait for the device.", batcher.waiting)
        if self._gpu is not None:
            yield from _gpu_gauges(self._gpu)


def _batches(sizes: Mapping[int, int]) -> Metric:
    counts = dict(sizes)  # a copy: the device thread changes it meanwhile
    buckets = [(str(bound), sum(n for size, n in counts.items() if size <= bound)) for bound in BATCH_BUCKETS]
    total = sum(size * n for size, n in counts.items())
    return HistogramMetricFamily(
        "cutfleet_batch_images", "Images in one device batch.", [*buckets, ("+Inf", sum(counts.values()))], total
    )


def _gpu_gauges(gpu: Gpu) -> Iterator[Metric]:
    """Yield nothing while the GPU does not answer."""
    try:
        use = gpu.use()
    except pynvml.NVMLError:
        return
    yield GaugeMetricFamily("cutfleet_gpu_busy_ratio", "Share of time in which a kernel ran.", use.busy)
    yield GaugeMetricFamily("cutfleet_gpu_memory_used_bytes", "GPU memory used by all processes.", use.used_bytes)
    yield GaugeMetricFamily("cutfleet_gpu_memory_total_bytes", "GPU memory in total.", use.total_bytes)
