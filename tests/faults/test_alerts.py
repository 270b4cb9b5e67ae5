"""Each alert of `infra/monitoring/rules.yml` fires on its fault and resolves when the fault ends: a real Prometheus
with the real rules, except that all durations are a hundredth."""

from __future__ import annotations

import functools
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pytest
import redis

from producer.demo.local_stack import free_port
from tests.faults.fleet import Fleet, Submit
from tests.faults.fork_server import ForkServer
from tests.faults.s3_proxy import Fault, S3Proxy
from tests.faults.stand_in_settings import MODEL
from tests.faults.wire import Wire
from tests.support import prometheus
from tests.support.images import put_images
from tests.support.places import Places
from tests.support.prometheus import Prometheus
from tests.support.waiting import wait_until

MEGABYTE = 2**20


class MonitoredFleet(Fleet):
    """A fleet that Prometheus scrapes, with one dispatcher, and workers as each test needs them."""

    def __enter__(self) -> Self:
        super().__enter__()
        self.dispatcher_port, self.worker_port = free_port(), free_port()
        self.redis: Any = redis.Redis(port=self.stack.redis_port)
        self.prometheus = Prometheus(self.stack.folder / "prometheus", [self.dispatcher_port, self.worker_port])
        try:
            self.prometheus.__enter__()
        except BaseException:
            super().__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self.prometheus.__exit__(*error)
        self.redis.close()
        super().__exit__(*error)

    def dispatch(self) -> int:
        return self.dispatchers.start(metrics_port=str(self.dispatcher_port))

    @contextmanager
    def worker(self, **settings: str) -> Iterator[int]:
        """Supervise a worker during the block."""
        pid = self.workers.start_supervised(metrics_port=str(self.worker_port), **settings)
        try:
            yield pid
        finally:
            self.workers.terminate()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Iterator[MonitoredFleet]:
    with MonitoredFleet(tmp_path_factory.mktemp("alerts"), fork_server) as fleet:
        yield fleet


@pytest.fixture
def dispatcher(fleet: MonitoredFleet) -> int:
    return fleet.dispatch()


def test_each_alert_of_the_rules_has_a_test_here() -> None:
    fired = set(re.findall(r"\"(Cutfleet\w+)\"", Path(__file__).read_text()))

    assert fired == {rule["alert"] for rule in prometheus.rules()}


def test_a_healthy_fleet_fires_no_alert(fleet: MonitoredFleet, dispatcher: int, places: Places, submit: Submit) -> None:
    put_images(fleet.store, places, 40)

    with fleet.worker():
        submit("--wait")
        fleet.prometheus.wait_until_resolved(*(rule["alert"] for rule in prometheus.rules()))


def test_images_whose_model_no_worker_serves_fire_alerts(
    fleet: MonitoredFleet, dispatcher: int, places: Places, submit: Submit
) -> None:
    put_images(fleet.store, places, 3)
    gone: dict[str, str | int | float] = {"model": MODEL, "slots": 4}
    fleet.ledger.fleet.heartbeat("gone", gone, ttl_s=60)  # a submission requires a worker for the model
    submit("--lane", "live")
    fleet.ledger.fleet.heartbeat("gone", gone, ttl_s=1)

    fleet.prometheus.wait_for_alerts("CutfleetLiveImageTooOld", "CutfleetNoProgress", "CutfleetModelNotServed")

    with fleet.worker():
        fleet.prometheus.wait_until_resolved("CutfleetLiveImageTooOld", "CutfleetNoProgress", "CutfleetModelNotServed")


def test_a_job_of_broken_images_fires_alerts(
    fleet: MonitoredFleet, dispatcher: int, places: Places, submit: Submit
) -> None:
    for number in range(300):
        fleet.store.put(places.key(f"{number:03}.jpg"), b"<html>404</html>", content_type="image/jpeg")

    with fleet.worker():
        job = submit()
        fleet.prometheus.wait_for_alerts("CutfleetDeadLettersGrowing", "CutfleetJobPaused")

        assert fleet.run("cancel", job).returncode == 0
        fleet.prometheus.wait_until_resolved("CutfleetDeadLettersGrowing", "CutfleetJobPaused")


def test_a_worker_that_dies_repeatedly_fires_an_alert(fleet: MonitoredFleet, dispatcher: int) -> None:
    def started() -> float | None:
        return fleet.prometheus.value(f'process_start_time_seconds{{instance="127.0.0.1:{fleet.worker_port}"}}')

    def has_restarted(before: float | None) -> bool:
        return started() not in (None, before)

    with fleet.worker():
        wait_until(lambda: started() is not None, what="Prometheus sees the worker")
        for _ in range(10):  # three suffice if Prometheus sees all of them in one window
            before = started()
            (pid,) = fleet.workers.alive()
            os.kill(pid, signal.SIGKILL)
            wait_until(functools.partial(has_restarted, before), what="Prometheus sees the next worker")
            if "CutfleetWorkerFlapping" in fleet.prometheus.firing_alerts():
                break
        fleet.prometheus.wait_for_alerts("CutfleetWorkerFlapping")

        fleet.prometheus.wait_until_resolved("CutfleetWorkerFlapping")


def test_a_worker_that_hangs_fires_an_alert(fleet: MonitoredFleet, dispatcher: int) -> None:
    with fleet.worker() as pid:
        os.kill(pid, signal.SIGSTOP)
        fleet.prometheus.wait_for_alerts("CutfleetDoesNotAnswer")

        os.kill(pid, signal.SIGCONT)
        fleet.prometheus.wait_until_resolved("CutfleetDoesNotAnswer")


def test_a_killed_dispatcher_fires_an_alert(fleet: MonitoredFleet, dispatcher: int) -> None:
    fleet.prometheus.wait_until_resolved("CutfleetNoDispatcher")
    os.kill(dispatcher, signal.SIGKILL)
    fleet.prometheus.wait_for_alerts("CutfleetNoDispatcher")

    fleet.dispatch()
    fleet.prometheus.wait_until_resolved("CutfleetNoDispatcher")


def test_redis_that_is_nearly_full_fires_an_alert(fleet: MonitoredFleet, dispatcher: int) -> None:
    full = 32 * MEGABYTE
    fleet.redis.config_set("maxmemory", full)

    _fill(fleet.redis, up_to=int(0.9 * full))
    fleet.prometheus.wait_for_alerts("CutfleetRedisMemory")

    fleet.redis.delete("junk")
    fleet.prometheus.wait_until_resolved("CutfleetRedisMemory")


def test_a_store_that_throttles_fires_an_alert(
    fleet: MonitoredFleet, dispatcher: int, places: Places, submit: Submit
) -> None:
    put_images(fleet.store, places, 40)
    with S3Proxy(fleet.stack.s3_port) as s3, fleet.worker(s3_endpoint=s3.url, test_device_ms="20"):
        with s3.fault(Fault("answer", status=503, code="SlowDown")):
            job = submit()
            fleet.prometheus.wait_for_alerts("CutfleetS3Errors")

        fleet.prometheus.wait_until_resolved("CutfleetS3Errors")
        wait_until(lambda: fleet.ledger.jobs.get(job).done == 40, what="every image is done")


def test_unreachable_redis_fires_an_alert(fleet: MonitoredFleet, places: Places, submit: Submit) -> None:
    put_images(fleet.store, places, 40)
    with Wire(fleet.stack.redis_port) as wire:
        through = {"redis_url": f"redis://127.0.0.1:{wire.port}/0"}
        fleet.dispatchers.start(metrics_port=str(fleet.dispatcher_port), **through)
        with fleet.worker(test_device_ms="100", **through):
            job = submit()
            wait_until(lambda: fleet.ledger.jobs.get(job).done > 4, what="the first images are done")
            wire.refuse()
            fleet.prometheus.wait_for_alerts("CutfleetRedisErrors")

            wire.allow()
            fleet.prometheus.wait_until_resolved("CutfleetRedisErrors")
            wait_until(lambda: fleet.ledger.jobs.get(job).done == 40, what="every image is done")


def _fill(client: Any, *, up_to: int) -> None:
    """Grow one list until Redis uses `up_to` bytes."""
    while client.info("memory")["used_memory"] < up_to:
        client.rpush("junk", b"x" * MEGABYTE)
