"""A job under audit: its records in S3 beside its state in the ledger; rebuilds the second from the first.

A lost job is rebuilt paused, so that nothing is fed before finished images are recorded as such. Lost for good: that it
was cancelled, paused or tuned; failures of a job that was not closed (those images are tried again).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from jobs.errors import JobError
from jobs.job import STATES_WITH_OUTPUTS, ImageState, Job
from jobs.ledger import Ledger
from jobs.ledger.connection import MAX_ROWS
from jobs.message import ImageTask
from jobs.s3.client import Store
from jobs.s3.location import Location
from producer.records.failures import write_spill
from producer.records.job_record import part_numbers, read_record
from producer.records.manifest import PART_ROWS, part_of, read_part, read_unrecorded, write_part
from producer.records.report import read_report
from producer.submission.validation import check_allowed

REBUILDING = "rebuilding: if it stays so, run `cutfleet audit --repair` again"
"""Reason of the pause while a job is rebuilt; shows that the rebuild was interrupted."""


class AuditedJob:
    """`job`: from the ledger, else from S3. `parts`: numbers of the manifest's parts in S3."""

    def __init__(self, folder: Location, *, ledger: Ledger, store: Store) -> None:
        """`folder`: s3://BUCKET/TO/_cutfleet/JOB/. Raises `JobError` `record_missing`."""
        self.ledger = ledger
        self.store = store
        self.record = read_record(folder, store)
        self.parts = part_numbers(self.record.job, store)
        job = ledger.jobs.find(self.record.job.id)
        self.in_ledger = job is not None
        self.job = job or self._recorded_job()

    @property
    def is_lost(self) -> bool:
        """Whether Redis lost the job before it was closed, or a rebuild was interrupted."""
        return self.job.paused == REBUILDING if self.in_ledger else not self.record.closed

    def refresh(self) -> Job:
        """Read the job again from the ledger, if it is there; return it."""
        if self.in_ledger:
            self.job = self.ledger.jobs.get(self.job.id)
        return self.job

    def lost_parts(self) -> list[int]:
        """Return the numbers of parts that are missing in S3."""
        recorded = 0 if self.record.rows else math.ceil(self.job.total / PART_ROWS)
        expected = self.job.parts if self.in_ledger else recorded
        count = max([expected, *(number + 1 for number in self.parts)])
        return sorted(set(range(count)) - set(self.parts))

    def tasks(self) -> Iterator[list[ImageTask]]:
        """Yield the images in order of index, at most one part at a time, without those of lost parts."""
        job, first, lost = self.refresh(), 0, set(self.lost_parts())
        while first < job.total:
            number, offset = divmod(first, PART_ROWS)
            if first < job.recorded and number in lost:
                first += PART_ROWS - offset
                continue
            tasks = self._tasks_from(first, job)
            if tasks and tasks[0].index == first:
                yield tasks
                first += len(tasks)
                continue
            recorded, job = job.recorded, self.refresh()
            if job.recorded == recorded:  # no part was recorded in the meantime: the other rows are lost
                return

    def states(self, tasks: Sequence[ImageTask]) -> list[ImageState]:
        """Return the states of consecutive images, as `tasks` yields them."""
        if self.in_ledger:
            return self.ledger.images.states(self.job.id, tasks[0].index, len(tasks))
        if self.record.closed:
            return read_report(self.job, tasks, store=self.store)[0]
        return [ImageState.OPEN] * len(tasks)

    def all_states(self) -> bytes:
        """Return the state of every image, one byte each."""
        states = bytearray()
        if self.in_ledger:
            for first in range(0, self.job.total, PART_ROWS):
                count = min(PART_ROWS, self.job.total - first)
                states += bytes(self.ledger.images.states(self.job.id, first, count))
        else:
            for tasks in self.tasks():
                states.extend(bytes(tasks[0].index - len(states)))  # of a lost part
                states += bytes(self.states(tasks))
        return bytes(states)

    def find_in_window(self, images: Sequence[str]) -> set[str]:
        """Return those of `images` that are in the window."""
        found: set[str] = set()
        for first in range(0, len(images), MAX_ROWS):
            found |= self.ledger.window.find_images(images[first : first + MAX_ROWS])
        return found

    def _tasks_from(self, first: int, job: Job) -> list[ImageTask]:
        """Return images up to the end of the part. They do not start with `first` if its row is elsewhere by now."""
        number, offset = divmod(first, PART_ROWS)
        if first < job.recorded:
            return read_part(self.store, job, number)[offset:]
        if self.in_ledger:
            return read_unrecorded(job, first=first - job.recorded, count=PART_ROWS - offset, ledger=self.ledger)
        rows = enumerate(self.record.rows)
        return [ImageTask(job.id, index, row.key, row.etag, row.size, job.lane) for index, row in rows]

    def _recorded_job(self) -> Job:
        """Return the job with the counts that its records imply."""
        job, parts, rows, total = self.record.job, len(self.parts), len(self.record.rows), self.record.total
        if not parts:
            return dataclasses.replace(job, listed=bool(rows), total=rows, unrecorded=rows)
        is_listed = total is not None
        if total is None:
            total = read_part(self.store, job, self.parts[-1])[-1].index + 1
        return dataclasses.replace(job, parts=parts, listed=is_listed, total=total)


def rebuild(audited: AuditedJob, *, spills: int = 0) -> None:
    """Create the job in the ledger, paused, with every image open. Safe to repeat. `spills`: parts of failures in S3.
    Raises `SourceError` or `OutputError` for a job outside the allowlist."""
    job, record, store = audited.record.job, audited.record, audited.store
    check_allowed(job.source, job.destination, store)
    conditional = store.supports_conditional_writes(job.record_path("job.json"), record.body)
    job = dataclasses.replace(job, conditional=conditional)
    if record.rows and not audited.parts:
        part = part_of(0, [row.key for row in record.rows])
        write_part(store, job, part, record.rows, is_next=lambda: True)
        audited.parts.append(0)
    audited.ledger.jobs.create(job, created=job.created, paused=REBUILDING, spills=spills)
    audited.in_ledger = True
    add_rows(audited)


def add_rows(audited: AuditedJob) -> None:
    """Add the parts of the manifest that the ledger does not have."""
    jobs, job = audited.ledger.jobs, audited.refresh()
    number = job.parts
    lister = jobs.take_listing(job.id) if number in audited.parts else ""
    while number in audited.parts:
        keys = [task.key for task in read_part(audited.store, job, number)]
        jobs.add_part(job.id, lister, part_of(number, keys))
        number += 1
    if audited.record.total is not None or job.lane == "live":
        jobs.finish_listing(job.id)
    audited.refresh()


def restore(audited: AuditedJob, states: Mapping[int, ImageState]) -> None:
    """Record images as final that S3 proves to be so."""
    rows = iter(states.items())
    while batch := dict(itertools.islice(rows, MAX_ROWS)):
        audited.ledger.images.restore(audited.job.id, batch)


def reopen(audited: AuditedJob, indexes: Iterable[int]) -> bool:
    """Reopen images whose outputs are missing or wrong. Return False when the job is cancelled."""
    if not audited.in_ledger:
        _rebuild_closed(audited)
    rows = iter(indexes)
    try:
        while batch := list(itertools.islice(rows, MAX_ROWS)):
            audited.ledger.images.reopen(audited.job.id, batch, states=STATES_WITH_OUTPUTS)
    except JobError:
        return False
    return True


def resume(audited: AuditedJob) -> None:
    """End the pause of a job that was rebuilt."""
    if audited.in_ledger and audited.refresh().paused == REBUILDING:
        audited.ledger.jobs.unpause(audited.job.id)


def _rebuild_closed(audited: AuditedJob) -> None:
    """Rebuild a job that was closed and forgotten, with states and failures from its report."""
    for tasks in audited.tasks():
        _, failures = read_report(audited.job, tasks, store=audited.store)
        number = tasks[0].index // PART_ROWS
        write_spill(audited.job, number, failures, audited.store, is_next=lambda: True)
    rebuild(audited, spills=audited.job.parts)
    for tasks in audited.tasks():
        states, _ = read_report(audited.job, tasks, store=audited.store)
        final = {task.index: state for task, state in zip(tasks, states, strict=True) if state is not ImageState.OPEN}
        restore(audited, final)
