"""The books of one job, in S3 and in the ledger; and how the ledger's are written anew from S3's.

A job that Redis lost is rebuilt paused, so that nothing is fed before it is known what is done already. Lost for good:
that it was cancelled, paused or tuned; failures of a job that was not closed (those images are tried again).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from jobs.errors import JobError
from jobs.job import ImageState, Job, ManifestPart
from jobs.ledger import MAX_ROWS, Check, Ledger
from jobs.message import ImageTask
from jobs.s3.client import Location, Store, record_location
from producer.records.failures import write_spill
from producer.records.job_record import part_numbers, read_record
from producer.records.manifest import PART_ROWS, read_part, read_unrecorded, write_part
from producer.records.report import read_report
from producer.submission.submit import check_bounds

REBUILDING = "being rebuilt: if nobody does, run `cutfleet audit --repair` once more"


class Books:
    """`job`: as the ledger has it, else as S3 does."""

    def __init__(self, folder: Location, *, ledger: Ledger, store: Store) -> None:
        """Raises `JobError` when there is no job's record in `folder`."""
        self._ledger = ledger
        self._store = store
        self.record = read_record(folder, store)
        self._parts = part_numbers(self.record.job, store)
        found = ledger.find_job(self.record.job.id)
        self.in_ledger = found is not None
        self.job = found or self._as_in_store()

    @property
    def is_lost(self) -> bool:
        """Neither in the ledger, nor closed and forgotten; or a repair was killed."""
        return self.job.paused == REBUILDING if self.in_ledger else not self.record.closed

    def of_other(self, folder: Location) -> Books:
        return Books(folder, ledger=self._ledger, store=self._store)

    def lost_parts(self) -> list[int]:
        """Numbers of those that should be in S3."""
        known = self.job.parts if self.in_ledger else 0 if self.record.rows else -(-self.job.total // PART_ROWS)
        return sorted(set(range(max([known, *(number + 1 for number in self._parts)]))) - set(self._parts))

    def missing_rows(self) -> str:
        """In words; empty when the ledger has all."""
        total = self.record.total
        if total is None or (self.job.total >= total and self.job.listed):
            return ""
        if self.job.listed or self.job.total < total:
            return f"The ledger has {self.job.total} images, the manifest {total}."
        return "The ledger does not know that the manifest is complete."

    def how_to_go_on(self) -> str:
        if self.job.watch:
            return "What arrived lately stood in Redis alone: start its watch with --existing, to find it again."
        return f"It was still being listed: cutfleet submit {self.job.source} --resume {self.job.id}"

    def tasks(self) -> Iterator[list[ImageTask]]:
        """The images in order of index, at most one part of the manifest at a time; without those of lost parts."""
        job, first, lost = self._fresh(), 0, set(self.lost_parts())
        while first < job.total:
            number, offset = divmod(first, PART_ROWS)
            recorded = job.total - job.unrecorded
            if first < recorded and number in lost:
                first += PART_ROWS - offset
                continue
            part = read_part(self._store, job, number)[offset:] if first < recorded else self._unrecorded(first, job)
            if part and part[0].index == first:
                yield part
                first += len(part)
                continue
            job = self._fresh()
            if job.total - job.unrecorded == recorded:
                return  # and no part was recorded meanwhile: the rest is lost

    def states(self, tasks: Sequence[ImageTask]) -> list[ImageState]:
        """Of images that follow one another, as `tasks` gives them."""
        if self.in_ledger:
            return self._ledger.states(self.job.id, tasks[0].index, len(tasks))
        return (
            read_report(self.job, tasks, store=self._store)[0] if self.record.closed else [ImageState.OPEN] * len(tasks)
        )

    def states_before(self) -> bytes:
        """Of all images: a byte for each."""
        known = bytearray()
        if self.in_ledger:
            for first in range(0, self.job.total, PART_ROWS):
                known += bytes(self._ledger.states(self.job.id, first, min(PART_ROWS, self.job.total - first)))
        else:
            for tasks in self.tasks():
                known[tasks[0].index :] = bytes(self.states(tasks))
        return bytes(known)

    def check(self, *, repair: bool) -> Check:
        return self._ledger.check(self.job.id, repair=repair)

    def in_window(self, images: Sequence[str]) -> set[str]:
        found: set[str] = set()
        for first in range(0, len(images), MAX_ROWS):
            found |= self._ledger.in_window(images[first : first + MAX_ROWS])
        return found

    def rebuild(self, *, spills: int = 0) -> None:
        """In the ledger, paused, everything open. Killed in between: done again. `spills`: parts of its failures that
        stand in S3. Raises `SourceError` or `OutputError` for a job whose places the store is not to touch."""
        job, body = self.record.job, self.record.body
        check_bounds(job.source, job.destination, self._store)
        conditional = self._store.honours_conditions(record_location(job.destination, job.id, "job.json"), body)
        job = dataclasses.replace(job, conditional=conditional)
        if self.record.rows and not self._parts:
            keys = [row.key for row in self.record.rows]
            part = ManifestPart(0, min(keys), max(keys), len(keys))
            write_part(self._store, job, part, list(self.record.rows), is_next=lambda: True)
            self._parts.append(0)
        self._ledger.create_job(job, created=job.created, paused=REBUILDING, spills=spills)
        self.in_ledger = True
        self.add_rows()

    def add_rows(self) -> None:
        """What the manifest has and the ledger does not."""
        number = self._fresh().parts
        lister = self._ledger.take_listing(self.job.id) if number in self._parts else ""
        while number in self._parts:
            keys = [task.key for task in read_part(self._store, self.job, number)]
            self._ledger.add_part(self.job.id, lister, ManifestPart(number, min(keys), max(keys), len(keys)))
            number += 1
        if self.record.total is not None or self.job.lane == "live":
            self._ledger.finish_listing(self.job.id)
        self._fresh()

    def restore(self, states: Mapping[int, ImageState]) -> None:
        rows = iter(states.items())
        while some := dict(itertools.islice(rows, MAX_ROWS)):
            self._ledger.restore(self.job.id, some)

    def reopen(self, images: Iterable[int]) -> str:
        """Returns what was done about them, in words."""
        if not self.in_ledger:
            self._revive()
        rows = iter(images)
        try:
            while some := list(itertools.islice(rows, MAX_ROWS)):
                states = (ImageState.DONE, ImageState.REVIEW, ImageState.SKIPPED)
                self._ledger.reopen(self.job.id, some, states=states)
        except JobError:
            return ""  # cancelled
        return "made again"

    def finish(self, *, repair: bool) -> None:
        """What was rebuilt goes on."""
        if repair and self.in_ledger and self._ledger.job(self.job.id).paused == REBUILDING:
            self._ledger.unpause(self.job.id)

    def _revive(self) -> None:
        """A job that was closed and forgotten, from its report. Its failures stand in S3 as before."""
        for tasks in self.tasks():
            failures = read_report(self.job, tasks, store=self._store)[1]
            write_spill(self.job, tasks[0].index // PART_ROWS, failures, self._store, is_next=lambda: True)
        self.rebuild(spills=self.job.parts)
        for tasks in self.tasks():
            states, _ = read_report(self.job, tasks, store=self._store)
            self.restore({task.index: state for task, state in zip(tasks, states, strict=True) if state})

    def _fresh(self) -> Job:
        if self.in_ledger:
            self.job = self._ledger.job(self.job.id)
        return self.job

    def _unrecorded(self, first: int, job: Job) -> list[ImageTask]:
        if self.in_ledger:
            first_row = first - (job.total - job.unrecorded)
            return read_unrecorded(job, first=first_row, count=PART_ROWS - first % PART_ROWS, ledger=self._ledger)
        rows = enumerate(self.record.rows)
        return [ImageTask(job.id, index, row.key, row.etag, row.size, job.lane) for index, row in rows]

    def _as_in_store(self) -> Job:
        job, parts, rows = self.record.job, len(self._parts), len(self.record.rows)
        if not parts:
            return dataclasses.replace(job, listed=bool(rows), total=rows, unrecorded=rows)
        total = self.record.total
        if total is None:
            total = read_part(self._store, job, self._parts[-1])[-1].index + 1
        return dataclasses.replace(job, parts=parts, listed=self.record.total is not None, total=total)
