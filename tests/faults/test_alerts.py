"""Alerts of `infra/monitoring/rules.yml`, fired by their faults and over when the fault is mended: a real Prometheus
with the rules as they are, but for their times, which are a hundredth."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from producer.demo.local_stack import free_port
from tests.faults.fleet import Fleet, Submit, Zygote
from tests.faults.proxy import Fault, S3Proxy, Wire
from tests.faults.terms import MODEL
from tests.support import prometheus
from tests.support.factories import Places, put_images, wait_until
from tests.support.prometheus import Prometheus

MEGABYTE = 2**20


class Watched(Fleet):
    """A fleet that Prometheus watches, with a dispatcher; workers as each test needs them."""

    def __enter__(self) -> Watched:
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
    def worker(self, *, supervised: bool = False, **settings: str) -> Iterator[int]:
        pid = self.workers.start(supervised=supervised, metrics_port=str(self.worker_port), **settings)
        try:
            yield pid
        finally:
            self.workers.dismiss()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Iterator[Watched]:
    with Watched(tmp_path_factory.mktemp("alerts"), zygote) as fleet:
        yield fleet


@pytest.fixture
def dispatcher(fleet: Watched) -> int:
    return fleet.dispatch()


def test_every_alert_is_fired_here() -> None:
    fired = set(re.findall(r"\"(Cutfleet\w+)\"", Path(__file__).read_text()))

    assert fired == {rule["alert"] for rule in prometheus.rules()}


def test_a_fleet_that_is_well_alarms_nobody(fleet: Watched, dispatcher: int, places: Places, submit: Submit) -> None:
    put_images(fleet.store, places, 40)

    with fleet.worker():
        submit("--wait")
        fleet.prometheus.wait_for_calm(*(rule["alert"] for rule in prometheus.rules()))


def test_images_that_nobody_serves(fleet: Watched, dispatcher: int, places: Places, submit: Submit) -> None:
    put_images(fleet.store, places, 3)
    gone = {"model": MODEL, "slots": 4}
    fleet.ledger.heartbeat("gone", gone, ttl_s=60)  # submitting asks whether anybody serves the model
    submit("--lane", "live")
    fleet.ledger.heartbeat("gone", gone, ttl_s=1)

    fleet.prometheus.wait_for_alarm("CutfleetLiveImageTooOld", "CutfleetNoProgress", "CutfleetModelNotServed")

    with fleet.worker():
        fleet.prometheus.wait_for_calm("CutfleetLiveImageTooOld", "CutfleetNoProgress", "CutfleetModelNotServed")


def test_a_job_of_broken_images(fleet: Watched, dispatcher: int, places: Places, submit: Submit) -> None:
    for number in range(300):
        fleet.store.put(places.key(f"{number:03}.jpg"), b"<html>404</html>", content_type="image/jpeg")

    with fleet.worker():
        job = submit()
        fleet.prometheus.wait_for_alarm("CutfleetDeadLettersGrowing", "CutfleetJobPaused")

        assert fleet.run("cancel", job).returncode == 0
        fleet.prometheus.wait_for_calm("CutfleetDeadLettersGrowing", "CutfleetJobPaused")


def test_a_worker_that_dies_again_and_again(fleet: Watched, dispatcher: int) -> None:
    def started() -> float | None:
        return fleet.prometheus.value(f'process_start_time_seconds{{instance="127.0.0.1:{fleet.worker_port}"}}')

    with fleet.worker(supervised=True):
        wait_until(lambda: started() is not None, what="Prometheus sees the worker")
        for _ in range(10):  # three are enough where Prometheus sees them all in one window
            before = started()
            (pid,) = fleet.workers.alive()
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda before=before: started() not in (None, before), what="Prometheus sees the next one")
            if "CutfleetWorkerFlapping" in fleet.prometheus.alarms():
                break
        fleet.prometheus.wait_for_alarm("CutfleetWorkerFlapping")

        fleet.prometheus.wait_for_calm("CutfleetWorkerFlapping")


def test_a_worker_that_hangs(fleet: Watched, dispatcher: int) -> None:
    with fleet.worker() as pid:
        os.kill(pid, signal.SIGSTOP)
        fleet.prometheus.wait_for_alarm("CutfleetDoesNotAnswer")

        os.kill(pid, signal.SIGCONT)
        fleet.prometheus.wait_for_calm("CutfleetDoesNotAnswer")


def test_a_dispatcher_that_is_killed(fleet: Watched, dispatcher: int) -> None:
    fleet.prometheus.wait_for_calm("CutfleetNoDispatcher")
    os.kill(dispatcher, signal.SIGKILL)
    fleet.prometheus.wait_for_alarm("CutfleetNoDispatcher")

    fleet.dispatch()
    fleet.prometheus.wait_for_calm("CutfleetNoDispatcher")


def test_redis_that_fills_up(fleet: Watched, dispatcher: int) -> None:
    full = 32 * MEGABYTE
    fleet.redis.config_set("maxmemory", full)

    _fill(fleet.redis, up_to=int(0.9 * full))
    fleet.prometheus.wait_for_alarm("CutfleetRedisMemory")

    fleet.redis.delete("junk")
    fleet.prometheus.wait_for_calm("CutfleetRedisMemory")


def test_a_store_that_throttles(fleet: Watched, dispatcher: int, places: Places, submit: Submit) -> None:
    put_images(fleet.store, places, 40)
    with S3Proxy(fleet.stack.s3_port) as s3, fleet.worker(s3_endpoint=s3.url, test_device_ms="20"):
        with s3.fault(Fault("answer", status=503, code="SlowDown")):
            job = submit()
            fleet.prometheus.wait_for_alarm("CutfleetS3Errors")

        fleet.prometheus.wait_for_calm("CutfleetS3Errors")
        wait_until(lambda: fleet.ledger.job(job).done == 40, what="no image was lost to it")


def test_redis_out_of_reach(fleet: Watched, places: Places, submit: Submit) -> None:
    put_images(fleet.store, places, 40)
    with Wire(fleet.stack.redis_port) as wire:
        through = {"redis_url": f"redis://127.0.0.1:{wire.port}/0"}
        fleet.dispatchers.start(metrics_port=str(fleet.dispatcher_port), **through)
        with fleet.worker(test_device_ms="100", **through):
            job = submit()
            wait_until(lambda: fleet.ledger.job(job).done > 4, what="it works")
            wire.refuse()
            fleet.prometheus.wait_for_alarm("CutfleetRedisErrors")

            wire.allow()
            fleet.prometheus.wait_for_calm("CutfleetRedisErrors")
            wait_until(lambda: fleet.ledger.job(job).done == 40, what="no image was lost to it")


def _fill(client: Any, *, up_to: int) -> None:
    """One list of ours, until Redis uses so much."""
    while client.info("memory")["used_memory"] < up_to:
        client.rpush("junk", b"x" * MEGABYTE)
