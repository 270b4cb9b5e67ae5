"""Webhooks: posts signed events to a job's receiver when the job closes and, if requested, when an image is final.

Delivery is at least once. An event waits in the ledger until the receiver answers 2xx or 410, or `MAX_ATTEMPTS`
deliveries have failed in about two days; then the job counts it as undelivered, and `cutfleet webhooks replay JOB`
makes it due again. Bodies describe the state at the time of delivery.
"""

from __future__ import annotations

import base64
import concurrent.futures
import dataclasses
import functools
import hashlib
import hmac
import http.client
import json
import logging
import random
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jobs.errors import CutfleetError, SettingsError
from jobs.job import ImageState, Job
from jobs.ledger import Ledger
from jobs.ledger.connection import MAX_ROWS
from jobs.ledger.images import ImageResult
from jobs.ledger.outbox import Event
from jobs.logs import RepeatedErrors
from jobs.message import ImageTask
from jobs.s3.client import Store
from jobs.settings import Settings
from producer.records.manifest import ManifestReader
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


class Deliverer:
    """Delivers due events. A receiver gets its next events when its last deliveries have ended, so that a slow or
    unreachable one delays no other."""

    def __init__(self, ledger: Ledger, store: Store, settings: Settings) -> None:
        self._ledger = ledger
        self._settings = settings
        self._running: dict[concurrent.futures.Future[None], str] = {}
        self._failing_receivers: set[str] = set()
        self._manifest = functools.lru_cache(maxsize=CACHED_MANIFESTS)(
            lambda job_id: ManifestReader(ledger.jobs.get(job_id), store, ledger)
        )

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
        if (
            result.state is ImageState.OPEN if result else job.closed is None
        ):  # it was reopened: its next end makes another event
            self._ledger.outbox.finish(event, delivered=True)
            return
        self._record(event, job, *self._post(event, job, result))

    def _post(self, event: Event, job: Job, result: ImageResult | None) -> tuple[int, str]:
        """Return the HTTP status, 0 without an answer, and the reason of a failure, never with the URL: it may contain
        a secret. `result`: of an image; None: the event is the job's."""
        secrets, private = self._settings.webhook_secret, self._settings.webhook_private
        if not secrets:
            return 0, "CUTFLEET_WEBHOOK_SECRET is not set"
        try:
            if result is None:
                payload = _job_payload(job)
            else:
                (task,) = self._manifest(job.id).find(int(event.id.rpartition(":")[2]))
                payload = _image_payload(job, task, result)
            headers = payload.signed_headers(secrets, now=time.time())
            status = post(job.webhook, payload.body, headers, private=private)
        except Exception as exc:
            if not isinstance(exc, (CutfleetError, OSError, http.client.HTTPException)):
                log.exception("unexpected error", extra={"action": "webhook", "event": event.id})
            return 0, f"{type(exc).__name__}: {exc}"  # it uses up an attempt, so that it can't repeat for ever
        return status, f"the receiver answered {status}"

    def _record(self, event: Event, job: Job, status: int, reason: str) -> None:
        fields: dict[str, Any] = {"action": "webhook", "event": event.id, "attempt": event.tries + 1}
        if 200 <= status < 300:
            self._failing_receivers.discard(event.receiver)
            self._ledger.outbox.finish(event, delivered=True)
            log.info("delivered", extra=fields)
            return
        self._failing_receivers.add(event.receiver)
        if status == GONE or event.tries + 1 >= MAX_ATTEMPTS:
            self._ledger.outbox.finish(event, delivered=False)
            text = "given up: %s; `cutfleet webhooks replay %s` delivers it again"
            log.error(text, reason, job.id, extra=fields)
        else:
            pause_s = min(MAX_PAUSE_S, self._settings.retry_base_s * BACKOFF_FACTOR**event.tries)
            pause_s *= random.uniform(1 - JITTER, 1)  # noqa: S311
            self._ledger.outbox.retry_later(event, pause_s=pause_s)
            log.warning("delivery failed: %s", reason, extra=fields | {"seconds": round(pause_s, 1)})


@dataclasses.dataclass(frozen=True)
class Payload:
    """An event as a receiver gets it, by Standard Webhooks: `id` is the same for each delivery and replay of the event,
    so that a receiver can drop duplicates; an event that happens again, as after a retry, has another one."""

    id: str
    body: bytes

    def signed_headers(self, secrets: str, *, now: float) -> dict[str, str]:
        """Sign "id.timestamp.body" with each of `secrets`: one or two of `whsec_...`, separated by a space. `now`: Unix
        time."""
        timestamp = str(int(now))
        content = f"{self.id}.{timestamp}.".encode() + self.body
        keys = [base64.b64decode(secret.removeprefix("whsec_")) for secret in secrets.split()]
        signatures = [base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode() for key in keys]
        return {
            "Content-Type": "application/json",
            "User-Agent": "cutfleet",
            "webhook-id": self.id,
            "webhook-timestamp": timestamp,
            "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
        }


def _job_payload(job: Job) -> Payload:
    data = job.summary() | {"report": str(job.record_path("report/"))}
    return _make_payload("job.closed", f"{job.id}-closed-{round(1000 * (job.closed or 0))}", data)


def _image_payload(job: Job, task: ImageTask, result: ImageResult) -> Payload:
    needs_review = result.state is ImageState.REVIEW
    state = "done" if needs_review else result.state.name.lower()
    paths = job.paths(task.key)
    data = {"job": job.id, "index": task.index, "source": str(paths.source), "state": state, "review": needs_review}
    if result.state.has_outputs:
        data |= {"cutout": str(paths.cutout), "mask": str(paths.mask)}
    elif result.failure:
        data |= {"code": result.failure.code, "message": result.failure.message}
    reopened = f"-{result.reopened}" if result.reopened else ""
    return _make_payload(f"image.{state}", f"{job.id}-{task.index}-{state}{reopened}", data)


def _make_payload(event_type: str, event_id: str, data: Mapping[str, Any]) -> Payload:
    timestamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    body = json.dumps({"type": event_type, "timestamp": timestamp, "data": data}, ensure_ascii=False)
    return Payload(event_id, body.encode())
