"""Metrics: what counts as an error, a port for each, and a GPU that comes and goes."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest
import torch

import jobs.ledger.connection
import jobs.s3.client
from jobs.errors import CutfleetError, SettingsError
from jobs.ledger import Ledger
from jobs.metrics import Metrics
from jobs.s3.client import Location, Store
from producer.demo.local_stack import LocalStack, free_port
from producer.dispatcher.metrics import DispatcherMetrics
from workers.process.metrics import WorkerMetrics
from workers.process.nvml import Gpu, GpuUse, find_gpu


class Device:
    """What a predictor says of itself."""

    batch_sizes, device_s, batch_limit, waiting = {2: 1, 8: 1, 3: 2}, 1.5, 8, 3


class Card(Gpu):
    """A GPU as NVML would show it, until it falls off the bus."""

    def __init__(self) -> None:
        self.there = True

    def use(self) -> GpuUse:
        if not self.there:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return GpuUse(0.75, 10, 80)


def watch(metrics: WorkerMetrics, card: Card) -> None:
    model = SimpleNamespace(name="u2netp", revision="abc", device=torch.device("cuda"), dtype=torch.float16)
    leases = SimpleNamespace(in_flight=lambda: 5)
    metrics.watch(model, Device, leases, gpu=card, slots=24, draining=threading.Event())  # type: ignore[arg-type]  # figures alone


def test_a_port_in_use_is_refused_with_the_setting_to_change() -> None:
    port = free_port()

    with (
        Metrics().serve(port),
        pytest.raises(SettingsError, match="CUTFLEET_METRICS_PORT") as caught,
        Metrics().serve(port),
    ):
        pass

    assert caught.value.code == "port_taken"
    with Metrics().serve(port):
        pass  # and it is free again


def test_what_s3_says_of_one_image_is_no_error(store: Store, ledger: Ledger, stack: LocalStack) -> None:
    metrics = Metrics()
    metrics.listen(ledger=ledger, store=store)
    store.create_bucket("metrics-test")

    assert store.head(Location("metrics-test", "missing"), role="output") is None
    with pytest.raises(CutfleetError):
        store.put(Location("no-such-bucket", "x"), b"", content_type="text/plain")

    assert metrics.registry.get_sample_value("cutfleet_s3_requests_total") == 3
    assert metrics.registry.get_sample_value("cutfleet_s3_errors_total", {"kind": "bucket_missing"}) == 1
    assert metrics.registry.get_sample_value("cutfleet_s3_errors_total", {"kind": "output_missing"}) is None


def test_redis_out_of_reach_is_counted(store: Store) -> None:
    metrics = Metrics()
    with Ledger(f"redis://127.0.0.1:{free_port()}/0", name="nobody") as ledger:
        metrics.listen(ledger=ledger, store=store)
        with pytest.raises(CutfleetError):
            ledger.ping()

    assert metrics.registry.get_sample_value("cutfleet_redis_errors_total", {"kind": "redis_unreachable"}) == 1


def test_the_first_error_of_each_kind_is_an_increase(store: Store, ledger: Ledger) -> None:
    metrics = Metrics()
    metrics.listen(ledger=ledger, store=store)

    shown = {
        (sample.name, sample.labels["kind"])
        for family in metrics.registry.collect()
        for sample in family.samples
        if "kind" in sample.labels and sample.name.endswith("_total") and sample.value == 0
    }
    raised = re.compile(r'code="((?:redis|store)_\w+)"')
    for module, short in ((jobs.ledger.connection, "redis"), (jobs.s3.client, "s3")):
        kinds = set(raised.findall(Path(module.__file__).read_text()))
        assert kinds
        assert {(f"cutfleet_{short}_errors_total", kind) for kind in kinds} <= shown


def test_a_dispatcher_that_stands_by_shows_no_queues(ledger: Ledger) -> None:
    metrics = DispatcherMetrics()
    metrics.survey(ledger, [])
    assert metrics.registry.get_sample_value("cutfleet_dispatcher_active") == 1

    metrics.stand_by()

    assert metrics.registry.get_sample_value("cutfleet_dispatcher_active") == 0
    assert metrics.registry.get_sample_value("cutfleet_images", {"state": "ready"}) is None


def test_a_gpu_that_is_lost_takes_nothing_else_with_it() -> None:
    card = Card()
    metrics = WorkerMetrics()
    watch(metrics, card)
    value = metrics.registry.get_sample_value
    assert value("cutfleet_gpu_busy_ratio") == 0.75

    card.there = False

    assert value("cutfleet_gpu_busy_ratio") is None
    assert value("cutfleet_images_in_flight") == 5
    assert value("cutfleet_batch_images_sum") == 16


def test_how_full_batches_are_is_a_histogram_of_few_series() -> None:
    metrics = WorkerMetrics()
    watch(metrics, Card())

    (family,) = (family for family in metrics.registry.collect() if family.name == "cutfleet_batch_images")

    counts = {sample.labels["le"]: sample.value for sample in family.samples if sample.name.endswith("_bucket")}
    assert counts == {"1.0": 0, "2.0": 1, "4.0": 3, "8.0": 4, "16.0": 4, "32.0": 4, "64.0": 4, "+Inf": 4}
    assert metrics.registry.get_sample_value("cutfleet_batch_images_count") == 4


def test_a_cpu_has_no_gpu_metrics() -> None:
    assert find_gpu(torch.device("cpu")) is None
