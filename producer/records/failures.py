"""Failures of a job. The ledger holds up to `MAX_HELD`; the others are in S3 under
TO/_cutfleet/JOB/failures/NNNNNN.jsonl.gz, one JSON object per line: index, key, code, message, tries, at, worker."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from jobs.job import ImageState, Job
from jobs.ledger import Ledger
from jobs.ledger.connection import MAX_ROWS
from jobs.results import Failure
from jobs.s3.client import Store
from jobs.s3.location import Location
from producer.records.fenced_put import put_if_ours
from producer.records.job_record import write_reopened
from producer.records.manifest import damage_named, pack, unpack

MAX_HELD = 10_000
"""Failures of one job that stay in Redis: about 4 MB."""
SPILL_ROWS = 2_500
_MAX_PART_BYTES = 64_000_000


def all_failures(job: Job, *, ledger: Ledger, store: Store) -> Iterator[tuple[int, Failure]]:
    """Yield each failed image once, with its last failure, in no order. One part is in memory at a time."""
    seen = bytearray(job.total)

    def is_new(index: int) -> bool:
        """A scan may return a row twice, and a job may grow."""
        seen.extend(bytes(max(0, index + 1 - len(seen))))
        was_seen, seen[index] = seen[index], 1
        return not was_seen

    for index, failure in ledger.images.failures(job.id):
        if is_new(index):
            yield index, failure
    for number in reversed(range(ledger.jobs.get(job.id).spills)):  # read now: with what left the ledger meanwhile
        for index, failure in _read(store, job, number):
            if is_new(index) and ledger.images.states(job.id, index, 1) == [ImageState.FAILED]:
                yield index, failure


def spill(epoch: int, job: Job, *, ledger: Ledger, store: Store) -> bool:
    """Move `SPILL_ROWS` failures to S3 when the ledger holds more than `MAX_HELD`. Safe to repeat. Raises `Fenced`."""
    if ledger.images.count_failures(job.id) <= MAX_HELD:
        return False
    rows = dict(itertools.islice(ledger.images.failures(job.id), SPILL_ROWS))

    def is_next() -> bool:
        ledger.dispatch.check_lock(epoch)
        return ledger.jobs.get(job.id).spills == job.spills

    if not write_spill(job, job.spills, rows, store, is_next=is_next):
        return False
    return ledger.dispatch.drop_spilled(epoch, job.id, job.spills, rows)


def write_spill(
    job: Job, number: int, rows: Mapping[int, Failure], store: Store, *, is_next: Callable[[], bool]
) -> bool:
    """Write a part of failures. A part that the ledger counts is never replaced: its rows are nowhere else. `is_next`:
    as in `write_part`."""
    return put_if_ours(
        store,
        _location(job, number),
        pack(json_row(index, failure) for index, failure in rows.items()),
        content_type="application/gzip",
        conditional=job.conditional,
        is_ours=is_next,
    )


@contextmanager
def failures_on_disk(job: Job, *, ledger: Ledger, store: Store) -> Iterator[Callable[[int, int], dict[int, Failure]]]:
    """Sort all failures in a temporary file; yield a function that returns those of `count` images from index `first`
    on."""
    with contextlib.closing(sqlite3.connect("")) as table:
        table.execute("create table failures (image integer primary key, text text)")
        rows = ((index, failure.to_json()) for index, failure in all_failures(job, ledger=ledger, store=store))
        table.executemany("insert or replace into failures values (?, ?)", rows)

        def read(first: int, count: int) -> dict[int, Failure]:
            selected = table.execute(
                "select image, text from failures where image >= ? and image < ? order by image", (first, first + count)
            )
            return {index: Failure.from_json(text) for index, text in selected}

        yield read


def json_row(index: int, failure: Failure) -> str:
    return json.dumps({"index": index} | dataclasses.asdict(failure), ensure_ascii=False)


def replay(job: Job, code: str | None, *, ledger: Ledger, store: Store) -> int:
    """Reopen failed images, all or those with one code; return how many. Safe to repeat."""
    failures = all_failures(job, ledger=ledger, store=store)
    indexes = (index for index, failure in failures if code in (None, failure.code))
    changed = 0
    while rows := list(itertools.islice(indexes, MAX_ROWS)):
        if not changed:
            write_reopened(job, store)
        changed += ledger.images.reopen(job.id, rows, states=[ImageState.FAILED])
    return changed


def _read(store: Store, job: Job, number: int) -> Iterator[tuple[int, Failure]]:
    body, _ = store.get(_location(job, number), role="output", max_bytes=_MAX_PART_BYTES)
    with damage_named(f"Part {number} of the failures of job {job.id}"):
        rows = [json.loads(line) for line in unpack(body)]
        failures = [(int(row["index"]), Failure.from_fields(row)) for row in rows]
    yield from failures


def _location(job: Job, number: int) -> Location:
    return job.record_path(f"failures/{number:06d}.jsonl.gz")
