"""A loaded stack that Prometheus watches: a backfill and live images at once, and of each thing that a dashboard
shows going wrong one: broken images, S3 that throttles, Redis out of reach, a worker killed."""

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
from jobs.s3.client import Location
from producer.demo.local_stack import LocalStack, free_port
from producer.submission import submit as submission
from tests.faults.proxy import Fault, S3Proxy, Wire
from tests.support.factories import Places, put_images, wait_until
from tests.support.prometheus import Prometheus, expressions

PATIENCE_S = 300.0
WINDOW = "5s"
"""Of the rates: `$__rate_interval` of a Prometheus that looks every half second."""

Start = Callable[..., int]
"""Starts a process with settings as `LocalStack` takes them; returns its id when it is ready."""


@dataclasses.dataclass(frozen=True)
class Line:
    """`points`: seconds since the beginning, value; numbers alone."""

    labels: dict[str, str]
    points: list[tuple[float, float]]


class Load:
    """`places`: of the images. Workers and dispatcher reach Redis and S3 through proxies."""

    def __init__(self, stack: LocalStack, prometheus: Prometheus, wire: Wire, s3: S3Proxy, ports: list[int]) -> None:
        self.stack, self.prometheus, self.wire, self.s3 = stack, prometheus, wire, s3
        self.ports = ports
        self.places = Places("s3://loaded/photos/", "s3://loaded-results/")
        self.through = {"redis_url": f"redis://127.0.0.1:{wire.port}/0", "s3_endpoint": s3.url}

    def run(self, images: int, *, model: str, start_dispatcher: Start, start_worker: Start) -> float:
        """All of it, until every job is closed. Returns when it began, as `time.time()`."""

        def worker(port: int) -> int:
            return start_worker(metrics_port=str(port), **self.through)

        began = time.time()
        start_dispatcher(metrics_port=str(self.ports[0]), **self.through)
        first, *_ = [worker(port) for port in self.ports[1:]]
        self._wait_for(lambda: self._workers_seen() == len(self.ports) - 1, "Prometheus sees every worker")
        backfill = self._submit("shelf/", images, model=model, lane="backfill")
        self._wait_for(lambda: self._final(backfill) > images / 4, "a quarter is done")
        live = self._submit("new/", images // 4, model=model, lane="live")
        with self.s3.fault(Fault("answer", methods=("PUT",), share=0.7)):
            self._wait_until_seen("cutfleet_s3_errors_total")
        self._wait_for(lambda: self._final(live) > 0, "S3 is back")
        self.wire.refuse()
        self._wait_until_seen("cutfleet_redis_errors_total")
        self.wire.allow()
        final = self._final(backfill)
        self._wait_for(lambda: self._final(backfill) > final, "Redis is back")
        os.kill(first, signal.SIGKILL)
        self._wait_until_seen("cutfleet_reclaimed_images_total")
        worker(self.ports[1])
        self._wait_for(lambda: not self._open(), "every job is closed")
        return began

    def _submit(self, folder: str, images: int, *, model: str, lane: Lane) -> str:
        """One image in ten is broken."""
        source = Places(f"{self.places.source}{folder}", f"{self.places.to}{folder}")
        with self.stack.store() as store, self.stack.ledger() as ledger:
            for bucket in (Location.parse(uri).bucket for uri in (source.source, source.to)):
                store.create_bucket(bucket)
            put_images(store, source, images)
            for number in range(images // 10):
                store.put(source.key(f"p{number:05d}-page.jpg"), b"<html>404</html>", content_type="image/jpeg")
            request = submission.Request(
                source=source.source,
                destination=source.to,
                recipe=Recipe(model=model),
                lane=lane,
                name="load",
                keys=None,
            )
            return submission.submit(request, store=store, ledger=ledger, lease_s=60, listed=lambda _: None).id

    def _final(self, job: str) -> int:
        with self.stack.ledger() as ledger:
            return ledger.job(job).final

    def _open(self) -> bool:
        with self.stack.ledger() as ledger:
            return bool(ledger.open_jobs())

    def _workers_seen(self) -> int:
        return int(self.prometheus.value("count(rate(cutfleet_slots[2s]))") or 0)  # twice: an increase needs a before

    def _wait_until_seen(self, counter: str) -> None:
        """Prometheus has seen it grow."""
        self._wait_for(lambda: (self.prometheus.value(f"sum({counter})") or 0) > 0, f"{counter} grows")

    def _wait_for(self, is_so: Callable[[], bool], what: str) -> None:
        wait_until(is_so, within_s=PATIENCE_S, what=what)


@contextmanager
def watched(stack: LocalStack, folder: Path, *, workers: int) -> Iterator[Load]:
    ports = [free_port() for _ in range(1 + workers)]
    with (
        Wire(stack.redis_port) as wire,
        S3Proxy(stack.s3_port, seed=7) as s3,
        Prometheus(folder / "prometheus", ports) as prometheus,
    ):
        yield Load(stack, prometheus, wire, s3, ports)


def ask_panels(prometheus: Prometheus, *, since: float, window: str = WINDOW) -> dict[tuple[str, str], list[Line]]:
    """Panel and expression of the dashboard -> its lines."""
    return {
        (panel, expression): [
            Line(row["metric"], [(at - since, float(text)) for at, text in row["values"] if _is_number(text)])
            for row in prometheus.history(expression, since=since)
        ]
        for panel, expression in expressions(window=window)
    }


def _is_number(text: str) -> bool:
    return math.isfinite(float(text))
