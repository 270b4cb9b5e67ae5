"""Rebuilds a job in the ledger from its records in S3.

A lost job is rebuilt paused, so that nothing is fed before finished images are recorded as such. Lost for good: that it
was cancelled, paused or tuned; failures of a job that was not closed (those images are tried again).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping

from jobs.errors import JobError
from jobs.job import STATES_WITH_OUTPUTS, ImageState
from jobs.ledger.connection import MAX_ROWS
from producer.audit.audited_job import REBUILDING, AuditedJob
from producer.records.failures import write_spill
from producer.records.manifest import PART_ROWS, part_of, read_part, write_part
from producer.records.report import read_report
from producer.submission.validation import check_allowed


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
