"""Metrics that workers and dispatchers share, and those of a dispatcher."""

from __future__ import annotations

import re

import pytest

from jobs.errors import CutfleetError, SettingsError
from jobs.ledger import Ledger
from jobs.metrics import Metrics
from jobs.s3.client import Store
from jobs.s3.location import Location
from producer.demo.local_stack import LocalStack, free_port
from producer.dispatcher.metrics import DispatcherMetrics
from tests.support.environment import ROOT


def test_a_port_in_use_is_refused_and_the_error_names_the_setting() -> None:
    port = free_port()

    with (
        Metrics().serve(port),
        pytest.raises(SettingsError, match="CUTFLEET_METRICS_PORT") as caught,
        Metrics().serve(port),
    ):
        pass

    assert caught.value.code == "port_taken"
    with Metrics().serve(port):
        pass  # the port is free again


def test_a_missing_object_is_not_an_error_of_s3(store: Store, ledger: Ledger, stack: LocalStack) -> None:
    metrics = Metrics()
    metrics.count_requests(ledger=ledger, store=store)
    store.create_bucket("metrics-test")

    assert store.head(Location("metrics-test", "missing"), role="output") is None
    with pytest.raises(CutfleetError):
        store.put(Location("no-such-bucket", "x"), b"", content_type="text/plain")

    assert metrics.registry.get_sample_value("cutfleet_s3_requests_total") == 3
    assert metrics.registry.get_sample_value("cutfleet_s3_errors_total", {"kind": "bucket_missing"}) == 1
    assert metrics.registry.get_sample_value("cutfleet_s3_errors_total", {"kind": "output_missing"}) is None


def test_a_failed_request_to_redis_is_counted(store: Store) -> None:
    metrics = Metrics()
    with Ledger(f"redis://127.0.0.1:{free_port()}/0", name="no server") as ledger:
        metrics.count_requests(ledger=ledger, store=store)
        with pytest.raises(CutfleetError):
            ledger.ping()

    assert metrics.registry.get_sample_value("cutfleet_redis_errors_total", {"kind": "redis_unreachable"}) == 1


@pytest.mark.parametrize(("service", "folder"), [("redis", "jobs/ledger"), ("s3", "jobs/s3")], ids=["redis", "s3"])
def test_each_kind_of_error_is_exposed_at_zero_from_the_start(
    store: Store, ledger: Ledger, service: str, folder: str
) -> None:
    metrics = Metrics()
    metrics.count_requests(ledger=ledger, store=store)

    exposed = {
        sample.labels["kind"]
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == f"cutfleet_{service}_errors_total" and sample.value == 0
    }

    modules = [path.read_text() for path in (*(ROOT / folder).glob("*.py"), ROOT / "jobs/errors.py")]
    prefix = "redis" if service == "redis" else "store"
    codes = set(re.findall(rf'code ?= ?"({prefix}_\w+)"', "".join(modules)))
    assert len(codes) > 3
    assert codes <= exposed


def test_a_standby_dispatcher_exposes_no_queues(ledger: Ledger) -> None:
    metrics = DispatcherMetrics()
    metrics.survey(ledger, [])
    assert metrics.registry.get_sample_value("cutfleet_dispatcher_active") == 1

    metrics.stand_by()

    assert metrics.registry.get_sample_value("cutfleet_dispatcher_active") == 0
    assert metrics.registry.get_sample_value("cutfleet_images", {"state": "ready"}) is None
