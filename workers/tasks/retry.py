"""Retry rules: the pause before another attempt, waiting while a service is away, and recording while Redis is away."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from jobs.errors import ServiceUnavailable, StoreBusy, StoreUnavailable, TransientError
from jobs.job import Job
from jobs.s3.client import Store
from jobs.settings import Settings
from workers.process.leases import Draining
from workers.tasks.attempt import Attempt

log = logging.getLogger(__name__)

T = TypeVar("T")
MAX_RETRY_PAUSE_S = 900.0
MAX_WAIT_PAUSE_S = 15.0
"""Longest pause between two calls while a service is away."""
MAX_WAIT_S = 300.0
"""Then the image is released: perhaps only this machine can't reach S3 (network, clock, credentials)."""
PROBES = 3
"""An overloaded store answers some requests: it counts as reachable only if all probes succeed."""
RECORD_PAUSE_S = 0.5


class ServiceAwayTooLong(Exception):
    """A service stayed away for `MAX_WAIT_S`: the image is released, and no attempt is used up."""


def retry_pause_s(tries: int, settings: Settings) -> float:
    """Return the pause before another attempt, with full jitter: a random share of a time that doubles with each of the
    `tries`, so that not all images return at once."""
    longest = min(MAX_RETRY_PAUSE_S, settings.retry_base_s * 2**tries)
    return random.uniform(0, longest)  # noqa: S311  (spreads load, keeps no secret)


def wait_while_away(work: Callable[[], T], attempt: Attempt) -> T:
    """Return what `work` returns; repeat it while a service as a whole is away, and keep the lease. The image is not
    the cause then, so no attempt is used up. Raises `TransientError` for a failure of the image's own objects,
    `Draining`, and `ServiceAwayTooLong`."""
    pause_s, deadline = 1.0, time.monotonic() + MAX_WAIT_S
    while True:
        try:
            return work()
        except (ServiceUnavailable, TransientError) as exc:
            if not _is_away(exc, attempt.job, attempt.worker.store):
                raise TransientError(str(exc), code=exc.code) from exc
            log.error("waiting for the service: %s", exc, extra={"action": "wait", "code": exc.code})
            if attempt.worker.draining.wait(pause_s):
                raise Draining from exc
            if time.monotonic() > deadline:
                raise ServiceAwayTooLong from exc
            pause_s = min(2 * pause_s, MAX_WAIT_PAUSE_S)


def record_with_retry(record: Callable[[], T], *, within_s: float) -> T:
    """Return what `record` returns; repeat it while Redis is unavailable. `within_s`: a lease; after it another worker
    attempts the image, which finds the outputs in S3."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            return record()
        except ServiceUnavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(RECORD_PAUSE_S)


def _is_away(error: ServiceUnavailable | TransientError, job: Job, store: Store) -> bool:
    """Whether a whole service fails, not only one object. Probes the source and the destination by other requests."""
    if not isinstance(error, (StoreUnavailable, StoreBusy)):
        return isinstance(error, ServiceUnavailable)
    records = job.record_path("")
    return not all(
        store.is_reachable(job.source, role="source") and store.is_reachable(records, role="output")
        for _ in range(PROBES)
    )
