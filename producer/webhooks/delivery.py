"""Webhooks: posts signed events to a job's receiver when the job closes and, if requested, when an image is final.

Delivery is at least once. An event waits in the ledger until the receiver answers 2xx or 410, or `MAX_ATTEMPTS`
deliveries have failed in about two days; then the job counts it as undelivered, and `cutfleet webhooks replay JOB`
makes it due again.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import http.client
import logging
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jobs.errors import CutfleetError, SettingsError
from jobs.job import ImageState, Job
from jobs.ledger import Ledger
from jobs.ledger.connection import MAX_ROWS
from jobs.ledger.images import ImageResult
from jobs.ledger.outbox import Event
from jobs.logs import RepeatedErrors
from jobs.s3.client import Store
from jobs.settings import Settings
from producer.records.manifest import ManifestReader
from producer.webhooks.payload import Payload, image_payload, job_payload
from producer.webhooks.safe_post import TargetRefused, check_target, post

log = logging.getLogger(__name__)

POLL_S = 1.0
MAX_DELIVERIES = 16
"""Deliveries at a time."""
MAX_PER_RECEIVER = 8
"""Deliveries at a time to one receiver; one if its last delivery failed."""
LEASE_S = 60
"""Four times the longest delivery; after it, another process delivers the event."""
MAX_ATTEMPTS = 10
BACKOFF_FACTOR = 4
"""Pauses of 5 s (`CUTFLEET_RETRY_BASE_S`), 20 s, 80 s, 5 min, 21 min, 85 min, 5.7 h, 12 h and 12 h."""
MAX_PAUSE_S = 43_200.0
JITTER = 0.2
GONE = 410
CACHED_MANIFESTS = 4


def check_webhook(url: str, settings: Settings) -> None:
    """Raises `SettingsError` when no event could be delivered to `url`."""
    if not settings.webhook_secret:
        raise SettingsError("To sign webhooks, set CUTFLEET_WEBHOOK_SECRET here and for `cutfleet dispatch`.")
    try:
        check_target(url, private=settings.webhook_private)
    except TargetRefused as exc:
        raise SettingsError(str(exc), code=exc.code) from exc


def replay(job: Job, *, ledger: Ledger) -> int:
    """Make all events of a job due again; return how many. Waits while the outbox is full. Raises `SettingsError`
    `no_webhook`."""
    if not job.webhook:
        raise SettingsError(f"Job {job.id} has no webhook: submit with `--webhook URL` to get one.", code="no_webhook")
    count = int(ledger.outbox.replay_job(job.id))
    first = 0
    while job.webhook_images and first < job.total:
        replayed, reached = ledger.outbox.replay_images(job.id, first, min(first + MAX_ROWS, job.total))
        if reached == first:
            time.sleep(POLL_S)
        count += replayed
        first = reached
    return count


@contextmanager
def delivering(ledger: Ledger, store: Store, settings: Settings, stop: threading.Event) -> Iterator[None]:
    """Deliver events in threads until the block ends, which sets `stop`. Several processes may deliver."""
    thread = threading.Thread(target=Deliverer(ledger, store, settings).run, args=(stop,), name="webhooks")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@dataclasses.dataclass(frozen=True)
class _Answer:
    """`status`: of HTTP; 0: no answer. `reason`: never holds the URL, which may contain a secret."""

    status: int
    reason: str

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300


class Deliverer:
    """Delivers due events. A receiver gets its next events when its last deliveries have ended, so that a slow or
    unreachable one delays no other."""

    def __init__(self, ledger: Ledger, store: Store, settings: Settings) -> None:
        self._ledger = ledger
        self._store = store
        self._settings = settings
        self._running: dict[concurrent.futures.Future[None], str] = {}
        self._failing_receivers: set[str] = set()
        self._manifest = functools.lru_cache(maxsize=CACHED_MANIFESTS)(self._open_manifest)

    def run(self, stop: threading.Event) -> None:
        """Deliver until `stop` is set, through outages of Redis."""
        errors = RepeatedErrors(log, action="webhook")
        with concurrent.futures.ThreadPoolExecutor(MAX_DELIVERIES, "webhook") as pool:
            while not stop.is_set():
                try:
                    self.step(pool)
                    errors.clear()
                except Exception as exc:  # its event is due again when the lease ends
                    errors.log(exc, "deliveries wait: %s", level=logging.WARNING)
                    stop.wait(POLL_S)
                if not self._running:
                    stop.wait(POLL_S)
                concurrent.futures.wait(self._running, POLL_S, concurrent.futures.FIRST_COMPLETED)

    def step(self, pool: concurrent.futures.Executor) -> None:
        """Start deliveries of due events, only as many as can run at once: the lease of an event that waited here would
        run out. Raises what an ended delivery raised."""
        for delivery in [delivery for delivery in self._running if delivery.done()]:
            del self._running[delivery]
            delivery.result()
        busy = set(self._running.values())
        for receiver in self._ledger.outbox.due_receivers(limit=MAX_DELIVERIES + len(busy)):
            limit = 1 if receiver in self._failing_receivers else MAX_PER_RECEIVER
            room = min(MAX_DELIVERIES - len(self._running), limit)
            if room and receiver not in busy:
                for event in self._ledger.outbox.take(receiver, limit=room, lease_s=LEASE_S):
                    self._running[pool.submit(self._deliver, event)] = receiver

    def _deliver(self, event: Event) -> None:
        job_id, _, index = event.id.partition(":")
        job = self._ledger.jobs.find(job_id)
        if job is None:  # Redis has forgotten it
            self._ledger.outbox.finish(event, delivered=False)
            return
        result = self._ledger.images.result(job_id, int(index)) if index else None
        is_open = result.state is ImageState.OPEN if result else job.closed is None
        if is_open:  # it was reopened: its next end makes another event
            self._ledger.outbox.finish(event, delivered=True)
            return
        self._record(event, job, self._post(event, job, result))

    def _post(self, event: Event, job: Job, result: ImageResult | None) -> _Answer:
        secrets, private = self._settings.webhook_secret, self._settings.webhook_private
        if not secrets:
            return _Answer(0, "CUTFLEET_WEBHOOK_SECRET is not set")
        try:
            payload = self._make_payload(event, job, result)
            headers = payload.signed_headers(secrets, now=time.time())
            status = post(job.webhook, payload.body, headers, private=private)
        except (CutfleetError, OSError, http.client.HTTPException) as exc:
            return _Answer(0, f"{type(exc).__name__}: {exc}")
        except Exception as exc:  # it uses up an attempt, so that it can't repeat for ever
            log.exception("unexpected error", extra={"action": "webhook", "event": event.id})
            return _Answer(0, f"{type(exc).__name__}: {exc}")
        return _Answer(status, f"the receiver answered {status}")

    def _make_payload(self, event: Event, job: Job, result: ImageResult | None) -> Payload:
        """`result`: of an image; None: the event is the job's."""
        if result is None:
            return job_payload(job)
        index = int(event.id.rpartition(":")[2])
        (task,) = self._manifest(job.id).find(index)
        return image_payload(job, task, result)

    def _record(self, event: Event, job: Job, answer: _Answer) -> None:
        fields: dict[str, Any] = {"action": "webhook", "event": event.id, "attempt": event.tries + 1}
        if answer.is_success:
            self._failing_receivers.discard(event.receiver)
            self._ledger.outbox.finish(event, delivered=True)
            log.info("delivered", extra=fields)
            return
        self._failing_receivers.add(event.receiver)
        if answer.status == GONE or event.tries + 1 >= MAX_ATTEMPTS:
            self._ledger.outbox.finish(event, delivered=False)
            text = "given up: %s; `cutfleet webhooks replay %s` delivers it again"
            log.error(text, answer.reason, job.id, extra=fields)
        else:
            pause_s = min(MAX_PAUSE_S, self._settings.retry_base_s * BACKOFF_FACTOR**event.tries)
            pause_s *= random.uniform(1 - JITTER, 1)  # noqa: S311
            self._ledger.outbox.retry_later(event, pause_s=pause_s)
            log.warning("delivery failed: %s", answer.reason, extra=fields | {"seconds": round(pause_s, 1)})

    def _open_manifest(self, job_id: str) -> ManifestReader:
        return ManifestReader(self._ledger.jobs.get(job_id), self._store, self._ledger)
