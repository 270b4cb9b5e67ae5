"""A watch: images that arrive under a prefix become images of one live job a day.

It hears of arrivals by SQS, by webhook and, for what both missed, by listing the prefix now and then. All three end in
`Watcher.take`: an arrival is in the ledger before anybody is told that it was heard, and what the ledger has as the
last version of its key (by ETag) is not taken again. Killed at any line, its queue, its webhook's sender or the next
listing brings back what it had not taken. Several may watch the same.

A worker takes the version that it finds, so that one that was replaced while it waited is no failure.
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
from jobs.s3.client import Location, S3Object, Store
from jobs.sqs import Letter, Mailbox
from producer.ingest.notifications import Arrival, BadEvent, arrivals_of, newest
from producer.records.job_record import part_numbers
from producer.submission.submit import Request, check_request, draft, live_row

log = logging.getLogger(__name__)

T = TypeVar("T")

BACKLOG = 10_000
"""Images of one job that may wait: some 20 MB of Redis. More arrivals wait where they are."""
BURST = 500
"""Arrivals that are taken in one step."""
BURST_S = 0.5
"""How long a burst is gathered after its first letter."""
MARGIN_S = 900.0
"""A listing looks again at what was put this long before the last one began: clocks differ."""
KEEP_S = 86_400.0
"""How long a version is known for sure. One that is announced later still is found to be done, by its output."""
RECEIVE_S = 5
"""How long an empty queue is asked at a time; as long may it take to stop."""
MAX_PAUSE_S = 15.0


class Backlog(TransientError):
    """Too much waits already; what could not be taken is to be offered again."""

    code = "backlog"


class Watcher:
    """`request` names source, destination and recipe; its lane is `live`. May be shared by threads."""

    def __init__(self, request: Request, *, store: Store, ledger: Ledger, lease_s: float) -> None:
        """Raises what `check_request` does."""
        check_request(request, ledger, store)
        self._request = request
        self._store = store
        self._ledger = ledger
        self._lease_s = lease_s
        self._source = Location.parse(request.source)
        what = "\n".join([request.source, request.destination, request.recipe.to_json()])
        self.id = hashlib.blake2b(what.encode(), digest_size=4).hexdigest()
        self._lock = threading.Lock()
        self._drafts: dict[str, Job] = {}

    def take(self, arrivals: Iterable[Arrival]) -> int:
        """Returns how many are new; when it returns, all are in the ledger. Raises `Backlog` when some are not."""
        found = [self._as_object(arrival) for arrival in newest(arrivals) if self._is_watched(arrival)]
        taken = 0
        with self._lock:
            for batch in _batched((row for row in found if row is not None), BURST):
                taken += self._append(batch)
        if taken:
            log.info("taken", extra={"action": "watch", "images": taken})
        return taken

    def begin(self, *, existing: bool) -> None:
        """A watch goes on from its last listing. One that remembers none (the first time, after 30 days without a run,
        after Redis was lost) begins with all that is there if `existing`, else now, and says what it leaves out. Raises
        what the store raises when the source can't be listed."""
        next(self._store.list_source(self._source), None)
        if self._ledger.swept(self.id) is not None:
            return
        if not existing:
            request = self._request
            log.warning(
                "begins now, since it remembers no listing: what was put earlier is not taken. To have it too: "
                "cutfleet submit %s --to %s --model %s --lane live --since DATE",
                *(request.source, request.destination, request.recipe.model),
                extra={"action": "watch"},
            )
        self._ledger.finish_sweep(self.id, began=0.0 if existing else time.time(), keep_s=KEEP_S)

    def sweep(self, stop: threading.Event) -> int:
        """Takes what was put since the last complete listing; waits while there is too much. Returns how many were
        new."""
        began, taken = time.time(), 0
        since = (self._ledger.swept(self.id) or 0.0) - MARGIN_S
        fresh = (found for found in self._store.list_source(self._source) if found.modified >= since)
        for batch in _batched(fresh, BURST):
            arrivals = [Arrival(self._source.bucket, found.key, found.etag, found.size) for found in batch]
            taken += patiently(lambda arrivals=arrivals: self.take(arrivals), stop)  # type: ignore[misc]
            if stop.is_set():
                return taken
        self._ledger.finish_sweep(self.id, began=began, keep_s=KEEP_S)
        return taken

    def empty(self, mailbox: Mailbox, *, wait_s: int = RECEIVE_S) -> int:
        """Takes one burst of letters; each is deleted after the ledger has its arrivals. Returns how many letters there
        were. One that makes no sense is left to the queue's own dead letters."""
        letters = _burst(mailbox, wait_s)
        arrivals: list[Arrival] = []
        understood: list[Letter] = []
        for letter in letters:
            try:
                arrivals += arrivals_of(letter.body)
                understood.append(letter)
            except BadEvent as exc:
                log.warning("left in the queue: %s", exc, extra={"action": "watch", "code": exc.code})
        self.take(arrivals)
        mailbox.delete(understood)
        return len(letters)

    def _append(self, rows: list[S3Object]) -> int:
        """Others may append too: as often as somebody came first, look again."""
        while True:
            seen = self._ledger.seen(self.id, [_digest(row.key) for row in rows])
            fresh = [(row, etag) for row, etag in zip(rows, seen, strict=True) if row.etag != etag]
            if not fresh:
                return 0
            job = self._todays_job()
            if job.open >= BACKLOG:
                raise Backlog(f"{job.open:,} images of job {job.id} wait: more are taken when workers have done some.")
            lines = [
                (_digest(row.key), etag, row.etag, *live_row(job.total + i, dataclasses.replace(row, etag=""), job))
                for i, (row, etag) in enumerate(fresh)
            ]
            if self._ledger.append_live(job, lines, lease_s=self._lease_s) == "ok":
                return len(fresh)

    def _todays_job(self) -> Job:
        """As the ledger has it, or about to be made. A day has a second one when its first was cancelled, or lost with
        Redis after parts of its manifest were written."""
        day = time.strftime("%Y%m%d", time.gmtime())
        number = 1
        while True:
            job_id = f"{day}-watch-{self.id}" + (f"-{number}" if number > 1 else "")
            job = self._ledger.find_job(job_id)
            if job is None:
                new = self._draft(job_id)
                if not part_numbers(new, self._store):
                    return new
            elif not (job.listed or job.cancelled):
                return job
            number += 1

    def _draft(self, job_id: str) -> Job:
        if job_id not in self._drafts:
            self._drafts = {job_id: draft(self._request, job_id=job_id, watch=self.id, store=self._store)}
        return self._drafts[job_id]

    def _is_watched(self, arrival: Arrival) -> bool:
        place = Location(arrival.bucket, arrival.key)
        if not str(place).startswith(str(self._source)) or arrival.key.endswith("/"):
            return False
        try:
            self._store.check(place, "source")
        except SourceError as exc:
            log.warning("left out: %s", exc, extra={"action": "watch", "code": exc.code})
            return False
        return True

    def _as_object(self, arrival: Arrival) -> S3Object | None:
        """None when it is gone already, where that had to be looked up."""
        if arrival.etag:
            return S3Object(arrival.key, arrival.etag, arrival.size)
        return self._store.head(Location(arrival.bucket, arrival.key), role="source")


def run_watch(
    watcher: Watcher, stop: threading.Event, *, queue: str | None, listen: str | None, token: str, sweep_every_s: float
) -> None:
    """Hears of arrivals until `stop` is set. `queue`: URL of an SQS queue; `listen`: HOST:PORT of the webhook."""
    with contextlib.ExitStack() as stack:
        if listen is not None:
            from producer.ingest.receiver import listening  # here, since it needs an extra

            host, _, port = listen.rpartition(":")
            if not token or not port.isdigit():
                raise SettingsError(
                    "To listen, give HOST:PORT, and set CUTFLEET_WATCH_TOKEN to what senders must show."
                )
            stack.enter_context(listening(watcher, host.strip("[]") or "127.0.0.1", int(port), token=token))
        work = [lambda: watch_listing(watcher, sweep_every_s, stop)]
        if queue is not None:
            mailbox = stack.enter_context(Mailbox(queue))
            work.append(lambda: watch_queue(watcher, mailbox, stop))
        with concurrent.futures.ThreadPoolExecutor(len(work), "watch") as pool:
            running = [pool.submit(part) for part in work]
            concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            stop.set()  # one that ended by a fault ends the others
            for part in running:
                part.result()


def watch_queue(watcher: Watcher, mailbox: Mailbox, stop: threading.Event) -> None:
    """Until `stop` is set."""
    while not stop.is_set():
        patiently(lambda: watcher.empty(mailbox), stop)


def watch_listing(watcher: Watcher, every_s: float, stop: threading.Event) -> None:
    """Lists at once, then every `every_s` seconds, until `stop` is set."""
    while not stop.is_set():
        patiently(lambda: watcher.sweep(stop), stop)
        stop.wait(every_s)


def patiently(work: Callable[[], int], stop: threading.Event) -> int:
    """Whatever happens to Redis, S3 and SQS, tries again until it works or `stop` is set (0 then). What was begun
    before is safe to do again."""
    pause_s, failing = 1.0, ""
    while not stop.is_set():
        try:
            return work()
        except SettingsError:
            raise  # waiting does not help
        except CutfleetError as exc:
            if exc.code != failing:
                log.error("waiting: %s", exc, extra={"action": "watch", "code": exc.code})
            failing = exc.code
            stop.wait(pause_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)
    return 0


def _burst(mailbox: Mailbox, wait_s: int) -> list[Letter]:
    letters = mailbox.receive(wait_s=wait_s)
    ends = time.monotonic() + BURST_S
    while letters and len(letters) < BURST and time.monotonic() < ends:
        more = mailbox.receive(wait_s=0)
        if not more:
            break
        letters += more
    return letters


def _digest(key: str) -> str:
    """Stands for a key in the ledger: 24 characters, whatever its length."""
    return hashlib.blake2b(key.encode(), digest_size=12).hexdigest()


def _batched(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    stream = iter(rows)
    while batch := list(itertools.islice(stream, size)):
        yield batch
