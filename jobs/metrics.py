"""What a worker and the dispatcher show Prometheus alike: the port, what was built, the process, S3 and Redis.

cutfleet_build_info{version, python}            1
process_resident_memory_bytes, process_start_time_seconds, process_cpu_seconds_total ...   of this process
cutfleet_s3_requests_total                      answered or not, after boto3's own two retries
cutfleet_s3_errors_total{kind}                  of those: S3 failed or refused us; `kind` is the error's code
cutfleet_redis_requests_total, cutfleet_redis_errors_total{kind}   likewise

What S3 says of one image (missing, replaced, there already) is an answer, not an error. No label holds a key, a job
or a worker's name: how many series there are depends on the code alone, and on how many models are served.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Info, ProcessCollector, start_http_server

from jobs.errors import CutfleetError, SettingsError

REDIS_FAULTS = ("redis_unreachable", "redis_full", "redis_cannot_save", "redis_denied", "redis_failed")
S3_FAULTS = (
    *("store_unreachable", "store_busy", "store_denied", "store_failed", "store_unsupported"),
    *("source_denied", "output_denied", "bucket_missing"),
)
"""Shown from the start, at 0: Prometheus takes what a series begins with for no increase, and would miss the first."""


class Service(Protocol):
    """A store or a ledger. `heard` is told of each answer: None, or the error it was."""

    heard: Callable[[CutfleetError | None], None]


class Metrics:
    """A registry of its own, so that two in one process never meet. Counting is safe for threads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        build = Info("cutfleet_build", "What runs here.", registry=self.registry)
        build.info({"version": importlib.metadata.version("cutfleet"), "python": platform.python_version()})

    def listen(self, *, ledger: Service, store: Service) -> None:
        """Counts the requests of both from now on."""
        ledger.heard = self._counter("redis", "Redis", REDIS_FAULTS)
        store.heard = self._counter("s3", "S3", S3_FAULTS)

    @contextmanager
    def serve(self, port: int) -> Iterator[None]:
        """Answers `/metrics` on `port` of every address until the block ends; 0: not at all. Raises `SettingsError`
        when the port is taken."""
        if not port:
            yield
            return
        try:
            server, thread = start_http_server(port, registry=self.registry)
        except OSError as exc:
            raise SettingsError(
                f"Port {port} can't be had for metrics: {exc.strerror}. Give each worker and dispatcher of a host a "
                "port of its own: CUTFLEET_METRICS_PORT.",
                code="port_taken",
            ) from exc
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def _counter(self, short: str, name: str, kinds: Sequence[str]) -> Callable[[CutfleetError | None], None]:
        requests = Counter(f"cutfleet_{short}_requests", f"Requests to {name}.", registry=self.registry)
        errors = Counter(
            f"cutfleet_{short}_errors", f"Requests that {name} failed or refused.", ["kind"], registry=self.registry
        )
        for kind in kinds:
            errors.labels(kind)

        def heard(error: CutfleetError | None) -> None:
            requests.inc()
            if error is not None and _is_fault(error):
                errors.labels(error.code).inc()

        return heard


def _is_fault(error: CutfleetError) -> bool:
    return error.retry or error.code.endswith("_denied") or error.code == "bucket_missing"
