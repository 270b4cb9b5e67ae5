"""Prometheus metrics that workers and dispatcher share: build, process, requests to S3 and Redis; and the HTTP port.

cutfleet_build_info{version, python}            1
process_resident_memory_bytes, process_start_time_seconds, process_cpu_seconds_total ...   of this process
cutfleet_s3_requests_total                      requests, counted once after boto3's own two retries
cutfleet_s3_errors_total{kind}                  requests that S3 failed or refused; `kind` is the error's code
cutfleet_redis_requests_total, cutfleet_redis_errors_total{kind}   likewise

An answer about one image (missing, replaced, exists already) is not an error. No label holds a key, a job or a worker's
name: the number of series depends only on the code and on the number of models.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Info, ProcessCollector, start_http_server

from jobs.errors import CutfleetError, SettingsError

REDIS_ERRORS = ("redis_unreachable", "redis_full", "redis_cannot_save", "redis_denied", "redis_failed")
S3_ERRORS = (
    *("store_unreachable", "store_busy", "store_denied", "store_failed", "store_unsupported"),
    *("source_denied", "output_denied", "bucket_missing"),
)
"""Exposed at 0 from the start: Prometheus ignores the first value of a series, so the first error would be lost."""


class Service(Protocol):
    """A store or a ledger. It calls `on_answer` after each request, with the error or None."""

    on_answer: Callable[[CutfleetError | None], None]


class Metrics:
    """One registry for each instance, so that two in one process do not collide. Counting is safe for threads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        build = Info("cutfleet_build", "Version of this process and of Python.", registry=self.registry)
        build.info({"version": importlib.metadata.version("cutfleet"), "python": platform.python_version()})

    def count_requests(self, *, ledger: Service, store: Service) -> None:
        """Count the requests of both from now on."""
        ledger.on_answer = self._counter("redis", "Redis", REDIS_ERRORS)
        store.on_answer = self._counter("s3", "S3", S3_ERRORS)

    @contextmanager
    def serve(self, port: int) -> Iterator[None]:
        """Answer `/metrics` on `port` of every address until the block ends; 0: off. Raises `SettingsError`
        `port_taken`."""
        if not port:
            yield
            return
        try:
            server, thread = start_http_server(port, registry=self.registry)
        except OSError as exc:
            raise SettingsError(
                f"Metrics can't use port {port}: {exc.strerror}. Give each worker and dispatcher of a host its own "
                "CUTFLEET_METRICS_PORT.",
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
            f"cutfleet_{short}_errors",
            f"Requests to {name} that failed or were refused.",
            ["kind"],
            registry=self.registry,
        )
        for kind in kinds:
            errors.labels(kind)

        def count(error: CutfleetError | None) -> None:
            requests.inc()
            if error is not None and error.code in kinds:
                errors.labels(error.code).inc()

        return count
