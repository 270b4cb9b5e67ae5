"""Metrics: what counts as an error, a port for each, and a GPU that comes and goes."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pynvml
import pytest
import torch

from jobs.errors import CutfleetError, SettingsError
from jobs.ledger import Ledger
from jobs.metrics import Metrics
from jobs.store import Location, Store
from producer.local import LocalStack, free_port
from producer.metrics import DispatcherMetrics
from workers.metrics import WorkerMetrics
from workers.nvml import Gpu, GpuUse, find_gpu


class Device:
    """What a predictor says of itself."""

    batches, pictures, device_s, batch_limit, waiting = 2, 10, 1.5, 8, 3


class Card(Gpu):
    """A GPU as NVML would show it, until it falls off the bus."""

    def __init__(self) -> None:
        self.there = True

    def use(self) -> GpuUse:
        if not self.there:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return GpuUse(0.75, 10, 80)


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


def test_what_s3_says_of_one_picture_is_no_error(store: Store, ledger: Ledger, stack: LocalStack) -> None:
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
    model = SimpleNamespace(name="u2netp", revision="abc", device=torch.device("cuda"), dtype=torch.float16)
    leases = SimpleNamespace(in_flight=lambda: 5)
    metrics.watch(model, Device, leases, gpu=card, slots=24, draining=threading.Event())  # type: ignore[arg-type]  # figures alone
    value = metrics.registry.get_sample_value
    assert value("cutfleet_gpu_busy_ratio") == 0.75

    card.there = False

    assert value("cutfleet_gpu_busy_ratio") is None
    assert value("cutfleet_images_in_flight") == 5
    assert value("cutfleet_batch_images_total") == 10


def test_a_cpu_has_no_gpu_metrics() -> None:
    assert find_gpu(torch.device("cpu")) is None
