"""Feeding: puts the images of open jobs on their queues, within a window for each queue. What is fed is in the ledger
with its message in one step; killed at any line, the next dispatcher goes on from the job's cursor.

Jobs share a queue's room by weight; a job with a rate is fed no faster; one with a sample is paused behind it.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from jobs.broker import lane_queue
from jobs.catalogue import RENDER
from jobs.errors import CutfleetError, ImageError, OutputError
from jobs.job import Failure, ImageState, Job
from jobs.ledger import FEED_ROWS, MAX_ROWS, Ledger
from jobs.ledger.connection import Fenced
from jobs.message import ImageTask
from jobs.s3.client import Store
from producer.dispatcher.job_backoff import HeldUp
from producer.records.manifest import PART_ROWS, read_part, read_unrecorded
from producer.submission.submit import message_row

log = logging.getLogger(__name__)

MIN_WINDOW = 64
"""Images of one queue in flight when no worker has said how many slots it has."""
WINDOW_PER_SLOT = 4
MAX_PASSED = 10_000
"""Images of a job that was rebuilt that are passed over in a turn, since they are final."""
BURST_S = 2.0
"""What a limited job was not fed is made up for this long, not longer."""


class Shares:
    """Who is fed next: over time, jobs that always have images left get room exactly by their weights, however little
    room there is at once (stride scheduling). One that had nothing to be fed has no claim for that time."""

    def __init__(self) -> None:
        self._passes: dict[str, float] = {}

    def divide(self, room: int, wants: Mapping[str, int], weights: Mapping[str, int]) -> dict[str, int]:
        """At most `room` images, at most what each wants."""
        known = [self._passes[job] for job in wants if job in self._passes]
        start = min(known, default=0.0)
        self._passes = {job: self._passes.get(job, start) for job in wants}
        heap = [(passed, job) for job, passed in self._passes.items() if wants[job] > 0]
        heapq.heapify(heap)
        given = dict.fromkeys(wants, 0)
        for _ in range(room):
            if not heap:
                break
            passed, job = heap[0]
            given[job] += 1
            self._passes[job] = passed + 1 / weights[job]
            if given[job] < wants[job]:
                heapq.heapreplace(heap, (self._passes[job], job))
            else:
                heapq.heappop(heap)
        return given


class Allowance:
    """How many images a job with a rate may be fed now. A dispatcher that takes over begins with none."""

    def __init__(self) -> None:
        self._jobs: dict[str, tuple[float, float]] = {}

    def of(self, job: Job, now: float) -> int:
        if job.rate is None:
            return job.total
        allowed, since = self._jobs.get(job.id, (0.0, now))
        most = max(1.0, job.rate * BURST_S)
        allowed = min(most, allowed + job.rate * (now - since))
        self._jobs[job.id] = allowed, now
        return int(allowed)

    def use(self, job: Job, count: int) -> None:
        if job.id in self._jobs:
            allowed, since = self._jobs[job.id]
            self._jobs[job.id] = allowed - count, since

    def forget(self, kept: Iterable[str]) -> None:
        self._jobs = {job: self._jobs[job] for job in kept if job in self._jobs}


@dataclasses.dataclass
class _Part:
    number: int
    tasks: list[ImageTask]


class Feeder:
    """Belongs to one dispatcher; not safe for threads."""

    def __init__(
        self,
        ledger: Ledger,
        store: Store,
        *,
        lease_s: float,
        held_up: HeldUp,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger = ledger
        self._store = store
        self._lease_s = lease_s
        self._held_up = held_up
        self._clock = clock
        self._parts: dict[str, _Part] = {}
        self._again: dict[str, _Part] = {}
        self._shares: dict[str, Shares] = collections.defaultdict(Shares)
        self._allowance = Allowance()

    def feed(self, epoch: int, jobs: Iterable[Job]) -> bool:
        """Shares the room of each queue among the jobs that have images left for it. True when something was fed:
        there may soon be room again."""
        by_queue: dict[str, list[Job]] = collections.defaultdict(list)
        hungry = set()
        for job in jobs:
            by_queue[lane_queue(job.lane, job.model)].append(job)
            if job.cursor < job.total or job.again or not job.listed:
                hungry.add(job.id)
        slots = self._slots()
        fed = 0
        for queue, queued in by_queue.items():
            window = max(MIN_WINDOW, WINDOW_PER_SLOT * slots[queued[0].model])
            room = window - sum(job.window for job in queued)
            fed += self._feed_queue(epoch, self._shares[queue], room, queued)
        self._parts = {job: part for job, part in self._parts.items() if job in hungry}
        self._again = {job: part for job, part in self._again.items() if job in hungry}
        self._allowance.forget(hungry)
        return fed > 0

    def forget(self) -> None:
        """Another dispatcher is active now."""
        self._parts.clear()
        self._again.clear()
        self._shares.clear()
        self._allowance.forget(())

    def _feed_queue(self, epoch: int, shares: Shares, room: int, jobs: Sequence[Job]) -> int:
        now = self._clock()
        ready = {job.id: job for job in jobs if self._may_be_fed(epoch, job)}
        wants = {
            job.id: min(_end(job) - job.cursor + job.again, self._allowance.of(job, now)) for job in ready.values()
        }
        given = shares.divide(room, wants, {job.id: job.weight for job in ready.values()})
        fed = 0
        for job_id, count in given.items():
            done = self._feed_or_pause(epoch, ready[job_id], count)
            self._allowance.use(ready[job_id], done)
            fed += done
        return fed

    def _may_be_fed(self, epoch: int, job: Job) -> bool:
        if (
            job.paused is not None
            or job.cancelled
            or self._held_up.waits(job)
            or (job.cursor >= job.total and not job.again)
        ):
            return False
        if job.cursor < _end(job) or job.again:
            return True
        reason = f"the first {job.sample} are fed: look at them, then `cutfleet unpause {job.id}`"
        self._ledger.hold(epoch, job.id, reason)
        return False

    def _slots(self) -> collections.Counter[str]:
        slots: collections.Counter[str] = collections.Counter()
        for facts in self._ledger.workers().values():
            slots[facts["model"]] += int(facts["slots"])
            slots[RENDER] += int(facts["slots"]) * int(facts.get("renders", 0))
        return slots

    def _feed_or_pause(self, epoch: int, job: Job, count: int) -> int:
        """A manifest that can't be read is its own job's trouble; the others go on. It pauses the job where a person
        must see to it, and is tried again where the store may come back."""
        try:
            return self._feed(epoch, job, count)
        except ImageError as exc:
            log.error("paused: %s", exc, extra={"action": "feed", "job": job.id, "code": exc.code})
            self._ledger.hold(epoch, job.id, f"{exc.code}: {exc}")
        except Fenced:
            raise
        except Exception as exc:
            if isinstance(exc, CutfleetError) and exc.code.startswith("redis_"):
                raise
            self._held_up.note(job, exc, undone="fed")
        return 0

    def _feed(self, epoch: int, job: Job, count: int) -> int:
        fed = self._feed_again(epoch, job, min(count, MAX_ROWS)) if job.again else 0
        cursor = start = self._pass_over(epoch, job)
        end = min(_end(job), start + max(count, MAX_PASSED))
        while cursor < end and fed < count:
            tasks = self._tasks(job, cursor, min(end - cursor, count - fed, FEED_ROWS))
            rows = [_row(task, job) for task in tasks]
            entered = self._ledger.feed(epoch, job.id, cursor, rows, lease_s=self._lease_s)
            if entered is None:
                break
            cursor += len(rows)
            fed += entered
        return fed

    def _pass_over(self, epoch: int, job: Job) -> int:
        """Where the cursor stands after it has moved over what was skipped when it was listed."""
        cursor = job.cursor
        while job.skipped and cursor < _end(job):
            states = self._ledger.states(job.id, cursor, min(PART_ROWS, _end(job) - cursor))
            final = next((i for i, state in enumerate(states) if state is ImageState.OPEN), len(states))
            if not final or not self._ledger.pass_over(epoch, job.id, cursor, cursor + final):
                break
            cursor += final
        return cursor

    def _feed_again(self, epoch: int, job: Job, count: int) -> int:
        """Whatever version their sources have by now."""
        found = (self._task(job, index) for index in self._ledger.to_feed_again(job.id, count))
        tasks = [ImageTask(job.id, task.index, task.key, "", -1, job.lane) for task in found if task is not None]
        rows = {task.index: message_row(task, job) for task in tasks}
        return self._ledger.feed_again(epoch, job.id, rows, lease_s=self._lease_s)

    def _task(self, job: Job, index: int) -> ImageTask | None:
        """One image, wherever its row stands; None when it is just being moved there."""
        recorded = job.total - job.unrecorded
        if index < recorded:
            number, offset = divmod(index, PART_ROWS)
            part = self._again.get(job.id)
            if part is None or part.number != number:
                part = self._again[job.id] = _Part(number, read_part(self._store, job, number))
            if len(part.tasks) > offset:
                return part.tasks[offset]
            raise OutputError(f"Part {number} of the manifest ends before image {index}.", code="manifest_damaged")
        rows = read_unrecorded(job, first=index - recorded, count=1, ledger=self._ledger)
        return rows[0] if rows and rows[0].index == index else None

    def _tasks(self, job: Job, cursor: int, count: int) -> list[ImageTask]:
        """At most `count` images from `cursor` on, of one part of the manifest."""
        number, offset = divmod(cursor, PART_ROWS)
        part = self._parts.get(job.id)
        if part is None or part.number != number or len(part.tasks) <= offset:
            part = self._parts[job.id] = _Part(number, read_part(self._store, job, number))
        if len(part.tasks) <= offset:
            raise OutputError(f"Part {number} of the manifest ends before image {cursor}.", code="manifest_damaged")
        return part.tasks[offset : offset + count]


def _row(task: ImageTask, job: Job) -> tuple[str, str]:
    """Queue and message; of an archived image no queue, and why it fails: no worker is to look for it."""
    if task.hint != "archived":
        return message_row(task, job)
    text = f"{task.key} is archived: restore it first, then `cutfleet retry {job.id} --code source_archived`."
    return "", Failure(task.key, "source_archived", text, 0, time.time(), "").to_json()


def _end(job: Job) -> int:
    """Up to which index the job may be fed."""
    return job.total if job.sample is None else min(job.total, job.sample)
