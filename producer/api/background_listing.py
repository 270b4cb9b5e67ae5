"""Lists the prefixes of API requests that are too large to be listed within a call.

Every `cutfleet serve` looks for such jobs; a lease in Redis keeps others from listing the same one. If the process is
killed, another continues after the last manifest part that the ledger has.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import uuid

from jobs.errors import CutfleetError, JobError, ServiceUnavailable, TransientError
from jobs.job import Job
from jobs.ledger import Ledger
from jobs.logs import RepeatedErrors
from jobs.s3.client import Store
from producer.submission.request import Request
from producer.submission.submit import resume

log = logging.getLogger(__name__)

POLL_S = 2.0
LEASE_S = 30.0
"""After a process is killed, its listings wait this long."""
PARALLEL_LISTINGS = 4


class _Stopped(Exception):
    """The process shuts down."""


class BackgroundLister:
    """Lists in threads while its `with` block runs."""

    def __init__(self, ledger: Ledger, store: Store) -> None:
        self._ledger = ledger
        self._store = store
        self._id = uuid.uuid4().hex
        self._stop = threading.Event()
        self._pool = concurrent.futures.ThreadPoolExecutor(PARALLEL_LISTINGS, "lister")
        self._listings: dict[str, concurrent.futures.Future[None]] = {}
        self._thread = threading.Thread(target=self._run, name="lister")

    def __enter__(self) -> BackgroundLister:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._pool.shutdown(cancel_futures=True)

    def _run(self) -> None:
        errors = RepeatedErrors(log, action="list")
        while not self._stop.wait(POLL_S):
            try:
                self._step()
                errors.clear()
            except CutfleetError as exc:
                errors.log(exc)

    def _step(self) -> None:
        """Renew the leases of running listings, and start listings that no process has."""
        self._listings = {job: listing for job, listing in self._listings.items() if not listing.done()}
        for job in self._ledger.jobs.open():
            if not job.list_in_background or job.listed or job.cancelled or job.paused is not None:
                continue
            is_running = job.id in self._listings
            if not is_running and len(self._listings) == PARALLEL_LISTINGS:
                continue
            if self._ledger.quotas.lease_listing(job.id, self._id, ttl_s=LEASE_S) and not is_running:
                self._listings[job.id] = self._pool.submit(self._list, job)

    def _list(self, job: Job) -> None:
        fields = {"action": "list", "job": job.id}
        try:
            resume(job.id, request_of(job), store=self._store, ledger=self._ledger, listed=self._check_running)
            log.info("listed", extra=fields)
        except (_Stopped, JobError) as exc:  # cancelled meanwhile, or another process lists it by now
            log.info("listing stopped: %s", exc, extra=fields)
        except (ServiceUnavailable, TransientError) as exc:
            log.error("listing failed, will retry: %s", exc, extra=fields | {"code": exc.code})
        except CutfleetError as exc:
            self._pause(job, exc)
        except Exception as exc:
            log.exception("unexpected error", extra=fields)
            self._pause(job, TransientError(f"{type(exc).__name__}: {exc}", code="internal"))

    def _pause(self, job: Job, reason: CutfleetError) -> None:
        log.error("paused: %s", reason, extra={"action": "list", "job": job.id, "code": reason.code})
        self._ledger.jobs.pause(job.id, f"{reason.code}: {reason}")

    def _check_running(self, _: int) -> None:
        if self._stop.is_set():
            raise _Stopped("the process shuts down")


def request_of(job: Job) -> Request:
    """Return the request for everything under the job's source."""
    return Request(
        source=job.source, destination=job.destination, recipe=job.recipe, lane=job.lane, name=job.name, keys=None
    )
