"""Lists what the HTTP API was asked for and is too large to be listed within a request.

Every `cutfleet serve` looks for such jobs; a lease in Redis keeps the others away from what one lists. Killed at any
line, the next goes on behind the last part of the manifest that the ledger has.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import uuid

from jobs.errors import CutfleetError, JobError, ServiceUnavailable, TransientError
from jobs.job import Job
from jobs.ledger import Ledger
from jobs.recipe import Recipe
from jobs.s3.client import Store
from producer.submission.submit import Request, resume

log = logging.getLogger(__name__)

LOOK_S = 2.0
LEASE_S = 30.0
"""Of a process that was killed: so long nobody lists on."""
AT_ONCE = 4


class _Stopped(Exception):
    """This process is going down."""


class Lister:
    """Works beside the block it is entered for."""

    def __init__(self, ledger: Ledger, store: Store) -> None:
        self._ledger = ledger
        self._store = store
        self._me = uuid.uuid4().hex
        self._stop = threading.Event()
        self._pool = concurrent.futures.ThreadPoolExecutor(AT_ONCE, "lister")
        self._running: dict[str, concurrent.futures.Future[None]] = {}
        self._thread = threading.Thread(target=self._run, name="lister")

    def __enter__(self) -> Lister:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._pool.shutdown(cancel_futures=True)

    def _run(self) -> None:
        failing = ""
        while not self._stop.wait(LOOK_S):
            try:
                self._look()
                failing = ""
            except CutfleetError as exc:
                if exc.code != failing:
                    log.error(str(exc), extra={"action": "list", "code": exc.code})
                failing = exc.code

    def _look(self) -> None:
        """Renews the leases of what is being listed, and begins with what nobody lists."""
        self._running = {job: listing for job, listing in self._running.items() if not listing.done()}
        for job in self._ledger.open_jobs():
            if not job.to_be_listed or job.listed or job.cancelled or job.paused is not None:
                continue
            if job.id not in self._running and len(self._running) == AT_ONCE:
                continue
            if self._ledger.hold_listing(job.id, self._me, ttl_s=LEASE_S) and job.id not in self._running:
                self._running[job.id] = self._pool.submit(self._list, job)

    def _list(self, job: Job) -> None:
        try:
            resume(job.id, request_of(job), store=self._store, ledger=self._ledger, listed=self._go_on)
            log.info("listed", extra={"action": "list", "job": job.id})
        except (_Stopped, JobError) as exc:  # cancelled meanwhile, or somebody else's by now
            log.info("not listed on: %s", exc, extra={"action": "list", "job": job.id})
        except (ServiceUnavailable, TransientError) as exc:
            log.error("tried again soon: %s", exc, extra={"action": "list", "job": job.id, "code": exc.code})
        except CutfleetError as exc:
            self._pause(job, exc)
        except Exception as exc:
            log.exception("a bug, or a fault nobody thought of", extra={"action": "list", "job": job.id})
            self._pause(job, TransientError(f"{type(exc).__name__}: {exc}", code="internal"))

    def _pause(self, job: Job, why: CutfleetError) -> None:
        log.error("paused: %s", why, extra={"action": "list", "job": job.id, "code": why.code})
        self._ledger.pause(job.id, f"{why.code}: {why}")

    def _go_on(self, _: int) -> None:
        if self._stop.is_set():
            raise _Stopped("this process is going down")


def request_of(job: Job) -> Request:
    """As whoever asked for everything under the job's source."""
    return Request(
        source=job.source,
        destination=job.destination,
        recipe=Recipe.from_json(job.recipe),
        lane=job.lane,
        name=job.name,
        keys=None,
    )
