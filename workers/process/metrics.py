"""What a worker shows Prometheus, beside what `jobs/metrics.py` lists. One image costs it some ten microseconds.

cutfleet_images_total{outcome, lane}            what became of each image taken off a queue: done, review, skipped,
                                                failed, deferred, released, blamed (a process ended, perhaps over
                                                it), cancelled; suspect, busy, taken, final, gone, stale
cutfleet_image_errors_total{outcome, code}      failed and deferred ones by code
cutfleet_queue_wait_seconds{lane}               histogram: from publishing to the claim, by the Redis server's clock
cutfleet_stage_seconds{stage}                   histogram: fetch, decode, device (waiting for it included), encode,
                                                publish
cutfleet_images_in_flight, cutfleet_slots       images held now, and most of them at once
cutfleet_batch_images                           histogram: images in one batch that went through the model
cutfleet_batch_limit_images                     falls when the device runs out of memory
cutfleet_device_busy_seconds_total              its rate: the share of time in which the device thread works
cutfleet_device_waiting_images                  handed to the device and not yet answered
cutfleet_draining                               1 once the worker was told to go
cutfleet_model_info{model, revision, device, dtype}   1
cutfleet_gpu_busy_ratio, cutfleet_gpu_memory_used_bytes, cutfleet_gpu_memory_total_bytes   by NVML, where it is there
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

from jobs.ledger import Claim
from jobs.message import LANES, Lane
from jobs.metrics import Metrics
from workers.models import LoadedModel
from workers.models.batcher import Predictor
from workers.process.leases import Leases
from workers.process.nvml import Gpu

ENDS = ("done", "review", "skipped", "failed")
"""Shown from the start, at 0: Prometheus takes what a series begins with for no increase."""
STAGE_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
WAIT_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600, 14_400, 86_400)
"""A live image waits for moments, one of a backfill for as long as its window is deep."""

BATCH_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


class WorkerMetrics(Metrics):
    def __init__(self) -> None:
        super().__init__()
        self._images = Counter(
            "cutfleet_images", "Images by what became of them.", ["outcome", "lane"], registry=self.registry
        )
        for outcome, lane in itertools.product(ENDS, LANES):
            self._images.labels(outcome, lane)
        self._errors = Counter(
            "cutfleet_image_errors", "Images failed or deferred.", ["outcome", "code"], registry=self.registry
        )
        self._waits = Histogram(
            "cutfleet_queue_wait_seconds",
            "From publishing to the claim.",
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

    def claimed(self, claim: Claim, lane: Lane) -> None:
        """An image was taken off a queue; one that is not ours to do ends here."""
        if claim.verdict != "go":
            self._images.labels(claim.verdict, lane).inc()
        elif claim.waited_s is not None:
            self._waits.labels(lane).observe(claim.waited_s)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times the block; one that raises is not counted: a failure's time would hide among those of successes."""
        started = time.perf_counter()
        yield
        self._stages.labels(name).observe(time.perf_counter() - started)

    def stages(self, seconds: Mapping[str, float]) -> None:
        """By name, as the pipeline timed them itself."""
        for name, value in seconds.items():
            self._stages.labels(name).observe(value)

    def ended(self, lane: str, outcome: str, code: str | None) -> None:
        """`code`: of the error, for one that failed or is tried again later."""
        self._images.labels(outcome, lane).inc()
        if code is not None:
            self._errors.labels(outcome, code).inc()

    def watch(
        self,
        model: LoadedModel,
        predictor: Predictor,
        leases: Leases,
        *,
        gpu: Gpu | None,
        slots: int,
        draining: threading.Event,
    ) -> None:
        """Shows from now on what these say when Prometheus asks."""
        info = Info("cutfleet_model", "What is served.", registry=self.registry)
        dtype = str(model.dtype).removeprefix("torch.")
        info.info({"model": model.name, "revision": model.revision, "device": str(model.device), "dtype": dtype})
        Gauge("cutfleet_slots", "Most images held at once.", registry=self.registry).set(slots)
        self.registry.register(_Gauges(predictor, leases, gpu, draining))


class _Gauges(Collector):
    def __init__(self, predictor: Predictor, leases: Leases, gpu: Gpu | None, draining: threading.Event) -> None:
        self._predictor = predictor
        self._leases = leases
        self._gpu = gpu
        self._draining = draining

    def collect(self) -> Iterable[Metric]:
        predictor = self._predictor
        yield GaugeMetricFamily("cutfleet_images_in_flight", "Images held.", self._leases.in_flight())
        yield GaugeMetricFamily("cutfleet_draining", "1: told to go.", int(self._draining.is_set()))
        yield _batches(predictor.batch_sizes)
        yield GaugeMetricFamily("cutfleet_batch_limit_images", "Most images in a batch.", predictor.batch_limit)
        yield CounterMetricFamily("cutfleet_device_busy_seconds", "Time in the model.", predictor.device_s)
        yield GaugeMetricFamily("cutfleet_device_waiting_images", "Waiting for the device.", predictor.waiting)
        if self._gpu is not None:
            yield from _gpu_gauges(self._gpu)


def _batches(sizes: Mapping[int, int]) -> Metric:
    found = dict(sizes)  # the device's thread goes on counting
    buckets = [(str(bound), sum(n for size, n in found.items() if size <= bound)) for bound in BATCH_BUCKETS]
    total = sum(size * n for size, n in found.items())
    return HistogramMetricFamily(
        "cutfleet_batch_images", "Images in one batch.", [*buckets, ("+Inf", sum(found.values()))], total
    )


def _gpu_gauges(gpu: Gpu) -> Iterator[Metric]:
    """A GPU that no longer answers is missing from the graph, as it should be; the rest is still shown."""
    try:
        use = gpu.use()
    except pynvml.NVMLError:
        return
    yield GaugeMetricFamily("cutfleet_gpu_busy_ratio", "Share of time in which a kernel ran.", use.busy)
    yield GaugeMetricFamily("cutfleet_gpu_memory_used_bytes", "Of all processes.", use.used_bytes)
    yield GaugeMetricFamily("cutfleet_gpu_memory_total_bytes", "What the GPU has.", use.total_bytes)
