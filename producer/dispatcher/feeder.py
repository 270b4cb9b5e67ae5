"""Feeding: puts the images of open jobs on their queues, within a window for each queue. One script writes image,
message and cursor, so the next dispatcher continues from the job's cursor.

Jobs share a queue's room by weight; a job with a rate is fed no faster; one with a sample is paused after it.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Sequence

from jobs.envelope import message_row
from jobs.errors import ImageError, RedisUnavailable
from jobs.job import ImageState, Job
from jobs.ledger import Ledger
from jobs.ledger.connection import MAX_ROWS, Fenced
from jobs.ledger.dispatch import FEED_ROWS
from jobs.message import RENDER_POOL, ImageTask
from jobs.results import Failure
from jobs.s3.client import Store
from producer.dispatcher.fair_share import FairShare, RateLimit
from producer.dispatcher.job_backoff import JobBackoff
from producer.records.manifest import ManifestReader

log = logging.getLogger(__name__)

MIN_WINDOW = 64
"""Images of one queue in the window when no worker has reported its slots."""
WINDOW_PER_SLOT = 4
STATES_PER_CALL = 10_000
MAX_SKIPPED = 10_000
"""Images that one turn may pass over in a rebuilt job, since they are final."""


class Feeder:
    """Belongs to one dispatcher; not safe for threads."""

    def __init__(
        self,
        ledger: Ledger,
        store: Store,
        *,
        lease_s: float,
        backoff: JobBackoff,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger = ledger
        self._store = store
        self._lease_s = lease_s
        self._backoff = backoff
        self._clock = clock
        self._readers: dict[str, tuple[ManifestReader, ManifestReader]] = {}
        self._shares: dict[str, FairShare] = collections.defaultdict(FairShare)
        self._rate_limit = RateLimit()

    def feed(self, epoch: int, jobs: Sequence[Job]) -> bool:
        """Feed open jobs into the room of their queues. Return whether any image was fed: there may be room again
        soon."""
        by_queue: dict[str, list[Job]] = collections.defaultdict(list)
        for job in jobs:
            by_queue[job.queue].append(job)
        slots = self._count_slots()
        fed = 0
        for queue, queued in by_queue.items():
            window = max(MIN_WINDOW, WINDOW_PER_SLOT * slots[queued[0].model])
            room = window - sum(job.window for job in queued)
            fed += self._feed_queue(epoch, self._shares[queue], room, queued)
        unfinished = {job.id for job in jobs if _has_images_left(job) or not job.listed}
        self._readers = {job: readers for job, readers in self._readers.items() if job in unfinished}
        self._rate_limit.keep(unfinished)
        return fed > 0

    def reset(self) -> None:
        """Forget everything: another dispatcher is active."""
        self._readers.clear()
        self._shares.clear()
        self._rate_limit.keep(())

    def _count_slots(self) -> collections.Counter[str]:
        slots: collections.Counter[str] = collections.Counter()
        for heartbeat in self._ledger.fleet.workers().values():
            slots[heartbeat["model"]] += int(heartbeat["slots"])
            slots[RENDER_POOL] += int(heartbeat["slots"]) * int(heartbeat.get("renders", 0))
        return slots

    def _feed_queue(self, epoch: int, share: FairShare, room: int, jobs: Iterable[Job]) -> int:
        """Return how many images were fed."""
        now = self._clock()
        ready = self._select_ready(epoch, jobs)
        wanted = {
            job.id: min(_sample_end(job) - job.cursor + job.reopened, self._rate_limit.allowed(job, now=now))
            for job in ready.values()
        }
        shares = share.divide(room, wanted, {job.id: job.weight for job in ready.values()})
        fed = 0
        for job_id, count in shares.items():
            fed_of_job = self._feed_or_back_off(epoch, ready[job_id], count)
            self._rate_limit.use(ready[job_id], fed_of_job)
            fed += fed_of_job
        return fed

    def _select_ready(self, epoch: int, jobs: Iterable[Job]) -> dict[str, Job]:
        """Return the jobs that can be fed now. Pauses a job whose sample is fed."""
        ready: dict[str, Job] = {}
        for job in jobs:
            if job.paused is not None or job.cancelled or self._backoff.is_active(job) or not _has_images_left(job):
                continue
            if job.cursor < _sample_end(job) or job.reopened:
                ready[job.id] = job
            else:
                reason = f"the sample of {job.sample} images is fed: check it, then run `cutfleet unpause {job.id}`"
                self._ledger.dispatch.pause(epoch, job.id, reason)
        return ready

    def _feed_or_back_off(self, epoch: int, job: Job, count: int) -> int:
        """Return how many images were fed. An unreadable manifest affects only its own job: it is paused where a person
        must act, and backs off where the store may recover."""
        try:
            return self._feed_job(epoch, job, count)
        except ImageError as exc:
            log.error("paused: %s", exc, extra={"action": "feed", "job": job.id, "code": exc.code})
            self._ledger.dispatch.pause(epoch, job.id, f"{exc.code}: {exc}")
        except (Fenced, RedisUnavailable):
            raise
        except Exception as exc:
            self._backoff.start(job, exc, failed_step="feed")
        return 0

    def _feed_job(self, epoch: int, job: Job, count: int) -> int:
        if job.id not in self._readers:  # two, so that neither evicts the other's part of the manifest
            new, reopened = (ManifestReader(job, self._store, self._ledger) for _ in range(2))
            self._readers[job.id] = new, reopened
        new, reopened = self._readers[job.id]
        fed = self._feed_reopened(epoch, job, min(count, MAX_ROWS), reopened) if job.reopened else 0
        return fed + self._feed_new(epoch, job, count - fed, new)

    def _feed_reopened(self, epoch: int, job: Job, count: int, reader: ManifestReader) -> int:
        """Feed images once more, in the versions that their sources have now."""
        tasks = [task for index in self._ledger.dispatch.reopened_images(job.id, count) for task in reader.find(index)]
        rows = {
            task.index: message_row(ImageTask(job.id, task.index, task.key, "", -1, job.lane), job) for task in tasks
        }
        return self._ledger.dispatch.feed_reopened(epoch, job.id, rows, lease_s=self._lease_s)

    def _feed_new(self, epoch: int, job: Job, count: int, reader: ManifestReader) -> int:
        cursor = self._skip_final(epoch, job)
        end = min(_sample_end(job), cursor + max(count, MAX_SKIPPED))
        fed = 0
        while cursor < end and fed < count:
            tasks = reader.find(cursor, min(end - cursor, count - fed, FEED_ROWS))
            rows = [_feed_row(task, job) for task in tasks]
            queued = self._ledger.dispatch.feed(epoch, job.id, cursor, rows, lease_s=self._lease_s)
            if queued is None:
                break
            cursor += len(rows)
            fed += queued
        return fed

    def _skip_final(self, epoch: int, job: Job) -> int:
        """Move the cursor over images that were skipped by the listing; return the cursor."""
        cursor, end = job.cursor, _sample_end(job)
        while job.skipped and cursor < end:
            states = self._ledger.images.states(job.id, cursor, min(STATES_PER_CALL, end - cursor))
            final = next((i for i, state in enumerate(states) if state is ImageState.OPEN), len(states))
            if not final or not self._ledger.dispatch.skip_final(epoch, job.id, cursor, cursor + final):
                break
            cursor += final
        return cursor


def _has_images_left(job: Job) -> bool:
    return job.cursor < job.total or job.reopened > 0


def _sample_end(job: Job) -> int:
    """Return the index up to which the job may be fed."""
    return job.total if job.sample is None else min(job.total, job.sample)


def _feed_row(task: ImageTask, job: Job) -> tuple[str, str]:
    """Return a row for `Dispatch.feed`. An archived image fails here: its worker could not read it."""
    if task.hint != "archived":
        return message_row(dataclasses.replace(task, lane=job.lane), job)
    text = f"{task.key} is archived: restore it first, then run `cutfleet retry {job.id} --code source_archived`."
    return "", Failure(task.key, "source_archived", text, 0, time.time(), "").to_json()
