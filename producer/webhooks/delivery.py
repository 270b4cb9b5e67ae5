"""Webhooks: tells a job's receiver that the job is closed and, if asked for, what became of each image.

As Standard Webhooks has it: `webhook-id` (the same for each delivery and replay of one event, another when it happens
once more: what a receiver has seen it can drop), `webhook-timestamp`, `webhook-signature` (`v1,` and the HMAC-SHA256 of
"id.timestamp.body" in base64). At least once: an event waits in the ledger until the receiver answered 2xx, said 410,
or failed for some two days; then the job counts it as untold, and `cutfleet webhooks replay JOB` makes it due again.
Bodies say what is true at the delivery.
"""

from __future__ import annotations

import base64
import concurrent.futures
import functools
import hashlib
import hmac
import http.client
import json
import logging
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jobs.errors import CutfleetError, ServiceUnavailable, SettingsError
from jobs.job import ImageState, Job
from jobs.ledger import MAX_ROWS, Event, Ledger, Outcome
from jobs.message import ImageTask
from jobs.s3.client import Location, Store, image_names, record_location
from jobs.settings import Settings
from producer.records.manifest import find_rows, read_part
from producer.webhooks.safe_post import TargetRefused, check_target, post

log = logging.getLogger(__name__)

PAUSE_S = 1.0
AT_ONCE = 16
EACH = 8
"""Most deliveries under way to one receiver; to one that did not take the last, one."""
LEASE_S = 60
"""Four times what one delivery may take; after it, another process delivers what this one took."""
MAX_TRIES = 10
GROWTH = 4
"""5 s, 20 s, 80 s, 5 min, 21 min, 85 min, 5.7 h, 12 h, 12 h: two days with ten tries."""
MAX_PAUSE_S = 43_200.0
GONE = 410
_NAMES = {ImageState.REVIEW: "done"}


def check_webhook(url: str, settings: Settings) -> None:
    """Raises `SettingsError` when nothing could be told to `url`."""
    if not settings.webhook_secret:
        raise SettingsError("To sign webhooks, set CUTFLEET_WEBHOOK_SECRET here and for `cutfleet dispatch`.")
    try:
        check_target(url, private=settings.webhook_private)
    except TargetRefused as exc:
        raise SettingsError(str(exc), code=exc.code) from exc


def signed_headers(event_id: str, body: bytes, secrets: str, *, now: float) -> dict[str, str]:
    """`secrets`: one or two of `whsec_...`, with a space between."""
    stamp = str(int(now))
    content = f"{event_id}.{stamp}.".encode() + body
    keys = [base64.b64decode(secret.removeprefix("whsec_")) for secret in secrets.split()]
    signatures = [base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode() for key in keys]
    return {
        "Content-Type": "application/json",
        "User-Agent": "cutfleet",
        "webhook-id": event_id,
        "webhook-timestamp": stamp,
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
    }


def replay(job: Job, *, ledger: Ledger) -> int:
    """Makes due again what the receiver of a job was or should have been told. Returns how many events; waits while too
    many do."""
    if not job.webhook:
        raise SettingsError(
            f"Job {job.id} has no webhook: `submit --webhook URL` gives one to a job.", code="no_webhook"
        )
    count = int(ledger.retell_job(job.id))
    first = 0
    while job.webhook_images and first < job.total:
        told, reached = ledger.retell(job.id, first, min(first + MAX_ROWS, job.total))
        if reached == first:
            time.sleep(PAUSE_S)
        count += told
        first = reached
    return count


@contextmanager
def delivering(ledger: Ledger, store: Store, settings: Settings, stop: threading.Event) -> Iterator[None]:
    """Delivers in threads of its own until the block ends, which sets `stop`. Several processes may."""
    thread = threading.Thread(target=Deliverer(ledger, store, settings).run, args=(stop,), name="webhooks")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class Deliverer:
    """`run` until `stop` is set; `step` starts what is due. A receiver has its next turn when its last is over, so that
    one that is slow or away keeps no other waiting."""

    def __init__(self, ledger: Ledger, store: Store, settings: Settings) -> None:
        self._under_way: dict[concurrent.futures.Future[None], str] = {}
        self._away: set[str] = set()
        self._ledger = ledger
        self._store = store
        self._settings = settings
        self._part = functools.lru_cache(maxsize=4)(self._load_part)

    def run(self, stop: threading.Event) -> None:
        with concurrent.futures.ThreadPoolExecutor(AT_ONCE, "webhook") as pool:
            while not stop.is_set():
                try:
                    self.step(pool)
                except ServiceUnavailable as exc:
                    log.warning("webhooks wait: %s", exc, extra={"action": "webhook", "code": exc.code})
                    stop.wait(PAUSE_S)
                except Exception:  # a bug: the event comes again when its lease ends, and the others go on
                    log.exception("webhooks wait", extra={"action": "webhook"})
                    stop.wait(PAUSE_S)
                if not self._under_way:
                    stop.wait(PAUSE_S)
                concurrent.futures.wait(self._under_way, PAUSE_S, concurrent.futures.FIRST_COMPLETED)

    def step(self, pool: concurrent.futures.Executor) -> None:
        """Taken are only as many as can be under way at once, so that none waits here while its lease runs. Raises what
        a delivery did that is over."""
        for delivery in [delivery for delivery in self._under_way if delivery.done()]:
            del self._under_way[delivery]
            delivery.result()
        busy = set(self._under_way.values())
        for receiver in self._ledger.receivers_due(limit=AT_ONCE + len(busy)):
            room = min(AT_ONCE - len(self._under_way), 1 if receiver in self._away else EACH)
            if room and receiver not in busy:
                for event in self._ledger.take_events(receiver, limit=room, lease_s=LEASE_S):
                    self._under_way[pool.submit(self._deliver, event)] = receiver

    def _deliver(self, event: Event) -> None:
        facts: dict[str, Any] = {"action": "webhook", "event": event.id, "attempt": event.tries + 1}
        job_id, _, index = event.id.partition(":")
        job = self._ledger.find_job(job_id)
        if job is None:
            self._ledger.finish_event(event, told=False)
            return
        outcome = self._ledger.outcome(job_id, int(index)) if index else None
        is_open = outcome.state is ImageState.OPEN if outcome else job.closed is None
        if is_open:  # once more: its next end makes an event of its own
            self._ledger.finish_event(event, told=True)
            return
        status, reason = self._try(event, job, outcome)
        if 200 <= status < 300:
            self._away.discard(event.receiver)
            self._ledger.finish_event(event, told=True)
            log.info("told", extra=facts)
            return
        self._away.add(event.receiver)
        if status == GONE or event.tries + 1 >= MAX_TRIES:
            self._ledger.finish_event(event, told=False)
            log.error("given up: %s; `cutfleet webhooks replay %s` sends it again", reason, job.id, extra=facts)
        else:
            pause_s = min(MAX_PAUSE_S, self._settings.retry_base_s * GROWTH**event.tries) * random.uniform(0.8, 1)  # noqa: S311
            self._ledger.defer_event(event, pause_s=pause_s)
            log.warning("told later: %s", reason, extra=facts | {"seconds": round(pause_s, 1)})

    def _try(self, event: Event, job: Job, outcome: Outcome | None) -> tuple[int, str]:
        """Status, 0 without an answer, and what to say of it: never the URL, which may hold a secret."""
        if not self._settings.webhook_secret:
            return 0, "CUTFLEET_WEBHOOK_SECRET is not set"
        try:
            event_id, body = self._message(event, job, outcome)
        except CutfleetError as exc:
            return 0, f"{type(exc).__name__}: {exc}"
        except Exception as exc:  # it uses up a try, and keeps no other event waiting
            log.exception("a bug, or a fault nobody thought of", extra={"action": "webhook", "event": event.id})
            return 0, f"{type(exc).__name__}: {exc}"
        try:
            headers = signed_headers(event_id, body, self._settings.webhook_secret, now=time.time())
            status = post(job.webhook, body, headers, private=self._settings.webhook_private)
        except (CutfleetError, OSError, http.client.HTTPException) as exc:
            return 0, f"{type(exc).__name__}: {exc}"
        return status, f"the receiver answered {status}"

    def _message(self, event: Event, job: Job, outcome: Outcome | None) -> tuple[str, bytes]:
        """The event's id for its receiver, and its body. `outcome`: of an image."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        if outcome is None:
            kind, event_id = "job.closed", f"{job.id}-closed-{round(1000 * (job.closed or 0))}"
            data = job.summary() | {"report": str(record_location(job.destination, job.id, "report/"))}
        else:
            index = int(event.id.rpartition(":")[2])
            data = self._image(job, index, outcome)
            kind, event_id = f"image.{data['state']}", f"{job.id}-{index}-{data['state']}"
            if outcome.reopened:
                event_id += f"-{outcome.reopened}"
        body = json.dumps({"type": kind, "timestamp": now, "data": data}, ensure_ascii=False)
        return event_id, body.encode()

    def _image(self, job: Job, index: int, outcome: Outcome) -> dict[str, Any]:
        state, failure = outcome.state, outcome.failure
        (task,) = find_rows(job, index, 1, part=lambda number: self._part(job.id, number), ledger=self._ledger)
        names = image_names(job.source, job.destination, task.key)
        data: dict[str, Any] = {
            "job": job.id,
            "index": index,
            "source": str(Location(names.source.bucket, task.key)),
            "state": _NAMES.get(state, state.name.lower()),
            "review": state is ImageState.REVIEW,
        }
        if state in (ImageState.DONE, ImageState.REVIEW, ImageState.SKIPPED):
            return data | {"cutout": str(names.cutout), "mask": str(names.mask)}
        return data | ({"code": failure.code, "message": failure.message} if failure else {})

    def _load_part(self, job_id: str, number: int) -> list[ImageTask]:
        return read_part(self._store, self._ledger.job(job_id), number)
