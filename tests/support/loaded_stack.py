"""A loaded stack that Prometheus scrapes: a backfill and live images at once, with one fault of each kind that the
dashboard shows: broken images, S3 that throttles, unreachable Redis, a killed worker."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from jobs.message import Lane
from jobs.recipe import Recipe
from producer.demo.local_stack import LocalStack, free_port
from producer.submission.request import Request
from producer.submission.submit import submit
from tests.faults.s3_proxy import Fault, S3Proxy
from tests.faults.wire import Wire
from tests.support.images import put_images
from tests.support.places import Places
from tests.support.prometheus import Prometheus, panel_queries
from tests.support.waiting import wait_until

DEADLINE_S = 300.0
WINDOW = "5s"
"""`$__rate_interval` of a Prometheus that scrapes every half second."""

Start = Callable[..., int]
"""Starts a process with settings as `LocalStack` takes them; returns its id when it is ready."""


@dataclasses.dataclass(frozen=True)
class Series:
    """`points`: seconds since the beginning, and value; NaN and infinite values are left out."""

    labels: dict[str, str]
    points: list[tuple[float, float]]


class Load:
    """`places`: of the images. Workers and dispatcher reach Redis and S3 through proxies."""

    def __init__(self, stack: LocalStack, prometheus: Prometheus, wire: Wire, s3: S3Proxy, ports: list[int]) -> None:
        self.stack, self.prometheus, self.wire, self.s3 = stack, prometheus, wire, s3
        self.ports = ports
        self.places = Places("s3://loaded/photos/", "s3://loaded-results/")
        self.proxied = {"redis_url": f"redis://127.0.0.1:{wire.port}/0", "s3_endpoint": s3.url}

    def run(self, images: int, *, model: str, start_dispatcher: Start, start_worker: Start) -> float:
        """Cause load and faults until every job is closed. Return when it began, as Unix time."""

        def worker(port: int) -> int:
            return start_worker(metrics_port=str(port), **self.proxied)

        began = time.time()
        start_dispatcher(metrics_port=str(self.ports[0]), **self.proxied)
        first, *_ = [worker(port) for port in self.ports[1:]]
        self._wait_for(lambda: self._count_scraped_workers() == len(self.ports) - 1, "Prometheus scrapes every worker")
        backfill = self._submit("backfill/", images, model=model, lane="backfill")
        self._wait_for(lambda: self._final(backfill) > images / 4, "a quarter is final")
        live = self._submit("live/", images // 4, model=model, lane="live")
        with self.s3.fault(Fault("answer", methods=("PUT",), share=0.7)):
            self._wait_until_counted("cutfleet_s3_errors_total")
        self._wait_for(lambda: self._final(live) > 0, "S3 works again")
        self.wire.refuse()
        self._wait_until_counted("cutfleet_redis_errors_total")
        self.wire.allow()
        final = self._final(backfill)
        self._wait_for(lambda: self._final(backfill) > final, "Redis works again")
        os.kill(first, signal.SIGKILL)
        self._wait_until_counted("cutfleet_reclaimed_images_total")
        worker(self.ports[1])
        self._wait_for(lambda: not self._has_open_jobs(), "every job is closed")
        return began

    def _submit(self, folder: str, images: int, *, model: str, lane: Lane) -> str:
        """Submit `images` images, of which one in ten is broken; return the job's id."""
        places = Places(f"{self.places.source}{folder}", f"{self.places.to}{folder}")
        with self.stack.store() as store, self.stack.ledger() as ledger:
            for location in (places.source_location, places.destination):
                store.create_bucket(location.bucket)
            put_images(store, places, images)
            for number in range(images // 10):
                store.put(places.key(f"p{number:05d}-page.jpg"), b"<html>404</html>", content_type="image/jpeg")
            request = Request(
                source=places.source_location,
                destination=places.destination,
                recipe=Recipe(model=model),
                lane=lane,
                name="load",
                keys=None,
            )
            return submit(request, store=store, ledger=ledger, lease_s=60, listed=lambda _: None).id

    def _final(self, job: str) -> int:
        with self.stack.ledger() as ledger:
            return ledger.jobs.get(job).final

    def _has_open_jobs(self) -> bool:
        with self.stack.ledger() as ledger:
            return bool(ledger.jobs.open())

    def _count_scraped_workers(self) -> int:
        """Count the workers scraped at least twice: the increase of a counter needs two samples."""
        return int(self.prometheus.value("count(rate(cutfleet_slots[2s]))") or 0)

    def _wait_until_counted(self, counter: str) -> None:
        self._wait_for(
            lambda: (self.prometheus.value(f"sum({counter})") or 0) > 0, f"Prometheus has seen {counter} increase"
        )

    def _wait_for(self, is_so: Callable[[], bool], what: str) -> None:
        wait_until(is_so, within_s=DEADLINE_S, what=what)


@contextmanager
def monitored_load(stack: LocalStack, folder: Path, *, workers: int) -> Iterator[Load]:
    ports = [free_port() for _ in range(1 + workers)]
    with (
        Wire(stack.redis_port) as wire,
        S3Proxy(stack.s3_port, seed=7) as s3,
        Prometheus(folder / "prometheus", ports) as prometheus,
    ):
        yield Load(stack, prometheus, wire, s3, ports)


def query_panels(prometheus: Prometheus, *, since: float, window: str = WINDOW) -> dict[tuple[str, str], list[Series]]:
    """Return the series of each query of the dashboard, by panel title and query."""
    return {
        (panel, query): [
            Series(row["metric"], [(at - since, float(text)) for at, text in row["values"] if _is_finite(text)])
            for row in prometheus.history(query, since=since)
        ]
        for panel, query in panel_queries(window=window)
    }


def _is_finite(text: str) -> bool:
    return math.isfinite(float(text))
