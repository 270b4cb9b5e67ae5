"""A watch: images that arrive under a prefix become images of one live job a day.

Arrivals come from SQS, from a webhook, and from listing the prefix now and then, which finds what both missed. All
three call `Watcher.take`: an arrival is in the ledger before it is acknowledged, and a version (ETag) that the ledger
has already is not taken again. A watch may be killed at any line: SQS, the webhook's sender or the next listing brings
back what it had not taken. Several processes may run the same watch.

A worker takes the version that it finds: an object that is replaced while its image waits does not fail.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from jobs.errors import CutfleetError, SettingsError, SourceError, TransientError
from jobs.job import Job
from jobs.ledger import Ledger
from jobs.ledger.watches import Appended
from jobs.logs import RepeatedErrors
from jobs.s3.client import S3Object, Store
from jobs.sqs import SqsMessage, SqsQueue
from producer.ingest.notifications import Arrival, BadNotification, keep_newest, parse_notification
from producer.records.job_record import part_numbers
from producer.records.manifest import live_row
from producer.submission.request import Request
from producer.submission.submit import draft_job
from producer.submission.validation import check_request

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_BACKLOG = 10_000
"""Most open images of one job: some 20 MB of Redis. Further arrivals stay with their senders."""
BURST = 500
"""Most arrivals that are added in one step."""
BURST_S = 0.5
"""Time to gather a burst after its first SQS message."""
SWEEP_OVERLAP_S = 900.0
"""A sweep also takes objects written this long before the last one began: clocks differ."""
KEEP_S = 86_400.0
"""Time for which a version is remembered. If it is announced later, its worker finds its outputs and skips it."""
RECEIVE_S = 5
"""Longest wait for an SQS message; delays a shutdown by as much."""
MAX_PAUSE_S = 15.0


class BacklogFull(TransientError):
    """Too many images are open; arrivals that were not taken must be offered again."""

    code = "backlog"


class Watcher:
    """`request`: source, destination and recipe; its lane is `live`. Safe for threads."""

    def __init__(self, request: Request, *, store: Store, ledger: Ledger, lease_s: float) -> None:
        """Raises what `check_request` raises."""
        check_request(request, ledger, store)
        self._request = request
        self._store = store
        self._ledger = ledger
        self._lease_s = lease_s
        identity = "\n".join([str(request.source), str(request.destination), request.recipe.to_json()])
        self.id = hashlib.blake2b(identity.encode(), digest_size=4).hexdigest()
        self._lock = threading.Lock()
        self._drafts: dict[str, Job] = {}

    def begin(self, *, existing: bool) -> None:
        """Continue from the last recorded listing. Without one (a first run, 30 days without a run, or a lost Redis),
        begin with all objects if `existing`, else with those written from now on, and log which command submits the
        others. Raises what the store raises when the source can't be listed."""
        request = self._request
        next(self._store.list_source(request.source), None)
        if self._ledger.watches.last_sweep(self.id) is not None:
            return
        if not existing:
            log.warning(
                "no earlier listing is recorded: objects written before now are not taken. To take them too: "
                "cutfleet submit %s --to %s --model %s --lane live --since DATE",
                *(request.source, request.destination, request.recipe.model),
                extra={"action": "watch"},
            )
        self._ledger.watches.finish_sweep(self.id, began=0.0 if existing else time.time(), keep_s=KEEP_S)

    def take(self, arrivals: Iterable[Arrival]) -> int:
        """Put arrivals into the ledger; return how many are new. Raises `BacklogFull` when some are not taken."""
        watched = (self._find_object(arrival) for arrival in keep_newest(arrivals) if self._is_watched(arrival))
        objects = [found for found in watched if found is not None]
        taken = 0
        with self._lock:
            for batch in _batched(objects, BURST):
                taken += self._append(batch)
        if taken:
            log.info("taken", extra={"action": "watch", "images": taken})
        return taken

    def take_messages(self, queue: SqsQueue, *, wait_s: int = RECEIVE_S) -> int:
        """Receive one burst of messages; delete them once the ledger has their arrivals. Return how many came.
        Unreadable messages stay on the queue, for its dead-letter queue."""
        messages = _receive_burst(queue, wait_s)
        arrivals: list[Arrival] = []
        readable: list[SqsMessage] = []
        for message in messages:
            try:
                arrivals += parse_notification(message.body)
                readable.append(message)
            except BadNotification as exc:
                log.warning("left on the queue: %s", exc, extra={"action": "watch", "code": exc.code})
        self.take(arrivals)
        queue.delete(readable)
        return len(messages)

    def sweep(self, stop: threading.Event) -> int:
        """Take the objects written since the last complete listing, and wait while the backlog is full. Return how many
        are new."""
        source = self._request.source
        began, taken = time.time(), 0
        since = (self._ledger.watches.last_sweep(self.id) or 0.0) - SWEEP_OVERLAP_S
        recent = (found for found in self._store.list_source(source) if found.modified >= since)
        for batch in _batched(recent, BURST):
            arrivals = [Arrival(source.at(found.key), found.etag, found.size) for found in batch]
            taken += _retry_until_stopped(lambda arrivals=arrivals: self.take(arrivals), stop)  # type: ignore[misc]
            if stop.is_set():
                return taken
        self._ledger.watches.finish_sweep(self.id, began=began, keep_s=KEEP_S)
        return taken

    def _append(self, objects: list[S3Object]) -> int:
        """Add new versions to today's job; return how many. Starts over whenever another process appends first."""
        while True:
            digests = [_digest(found.key) for found in objects]
            seen = self._ledger.watches.seen_etags(self.id, digests)
            new = [row for row in zip(digests, seen, objects, strict=True) if row[1] != row[2].etag]
            if not new:
                return 0
            job = self._todays_job()
            if job.open >= MAX_BACKLOG:
                raise BacklogFull(f"{job.open:,} images of job {job.id} are open; the limit is {MAX_BACKLOG:,}.")
            rows = [
                (digest, etag, found.etag, *live_row(job.total + i, dataclasses.replace(found, etag=""), job))
                for i, (digest, etag, found) in enumerate(new)
            ]
            if self._ledger.watches.append_images(job, rows, lease_s=self._lease_s) is Appended.OK:
                return len(new)

    def _todays_job(self) -> Job:
        """Return the job from the ledger, or a draft of it. A day has another one after its first was cancelled, or was
        lost with Redis after parts of its manifest were written."""
        day = time.strftime("%Y%m%d", time.gmtime())
        number = 1
        while True:
            job_id = f"{day}-watch-{self.id}" + (f"-{number}" if number > 1 else "")
            job = self._ledger.jobs.find(job_id)
            if job is None:
                new = self._draft(job_id)
                if not part_numbers(new, self._store):
                    return new
            elif not (job.listed or job.cancelled):
                return job
            number += 1

    def _draft(self, job_id: str) -> Job:
        if job_id not in self._drafts:
            self._drafts = {job_id: draft_job(self._request, job_id=job_id, watch=self.id, store=self._store)}
        return self._drafts[job_id]

    def _is_watched(self, arrival: Arrival) -> bool:
        source, location = self._request.source, arrival.location
        if location.bucket != source.bucket or not location.key.startswith(source.key) or location.key.endswith("/"):
            return False
        try:
            self._store.check_allowed(location, "source")
        except SourceError as exc:
            log.warning("left out: %s", exc, extra={"action": "watch", "code": exc.code})
            return False
        return True

    def _find_object(self, arrival: Arrival) -> S3Object | None:
        """Return None when the ETag had to be looked up and the object is gone."""
        if arrival.etag:
            return S3Object(arrival.location.key, arrival.etag, arrival.size)
        return self._store.head(arrival.location, role="source")


def run_watch(
    watcher: Watcher, stop: threading.Event, *, queue: str | None, listen: str | None, token: str, sweep_every_s: float
) -> None:
    """Run SQS, webhook and sweeps side by side until `stop` is set. `queue`: URL of an SQS queue. `listen`: HOST:PORT
    of the webhook. `token`: see `receive_webhooks`. Raises what ends one of them: `SettingsError`, or a bug."""
    with contextlib.ExitStack() as stack:
        if listen is not None:
            from producer.ingest.receiver import receive_webhooks  # here, since it needs an extra

            host, port = _parse_address(listen, token)
            stack.enter_context(receive_webhooks(watcher.take, host, port, token=token))
        work = [lambda: _repeat(lambda: watcher.sweep(stop), stop, pause_s=sweep_every_s)]
        if queue is not None:
            sqs_queue = stack.enter_context(SqsQueue(queue))
            work.append(lambda: _repeat(lambda: watcher.take_messages(sqs_queue), stop, pause_s=0))
        with concurrent.futures.ThreadPoolExecutor(len(work), "watch") as pool:
            running = [pool.submit(part) for part in work]
            concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            stop.set()  # an error in one ends the others
            for part in running:
                part.result()


def _parse_address(listen: str, token: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    if not port.isdigit():
        raise SettingsError(f"--listen must be HOST:PORT (is {listen!r}).")
    if not token:
        raise SettingsError("--listen needs CUTFLEET_WATCH_TOKEN: the bearer token required from webhook senders.")
    return host.strip("[]") or "127.0.0.1", int(port)


def _repeat(work: Callable[[], int], stop: threading.Event, *, pause_s: float) -> None:
    while not stop.is_set():
        _retry_until_stopped(work, stop)
        stop.wait(pause_s)


def _retry_until_stopped(work: Callable[[], int], stop: threading.Event) -> int:
    """Return what `work` returns once it succeeds, or 0 once `stop` is set. Retries while Redis, S3 or SQS is
    unavailable: `work` must be safe to repeat. Raises `SettingsError`: waiting does not help."""
    pause_s, errors = 1.0, RepeatedErrors(log, action="watch")
    while not stop.is_set():
        try:
            return work()
        except SettingsError:
            raise
        except CutfleetError as exc:
            errors.log(exc, "will retry: %s")
            stop.wait(pause_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)
    return 0


def _receive_burst(queue: SqsQueue, wait_s: int) -> list[SqsMessage]:
    messages = queue.receive(wait_s=wait_s)
    ends = time.monotonic() + BURST_S
    while messages and len(messages) < BURST and time.monotonic() < ends:
        more = queue.receive(wait_s=0)
        if not more:
            break
        messages += more
    return messages


def _digest(key: str) -> str:
    """Return 24 characters that identify a key in the ledger."""
    return hashlib.blake2b(key.encode(), digest_size=12).hexdigest()


def _batched(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    stream = iter(rows)
    while batch := list(itertools.islice(stream, size)):
        yield batch
