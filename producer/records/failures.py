"""The images that failed, wherever their failures stand: in the ledger, and beyond `MAX_HELD` in S3 under
TO/_cutfleet/JOB/failures/NNNNNN.jsonl.gz, one JSON object a line: index, key, code, message, tries, at, worker."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from jobs.job import Failure, ImageState, Job
from jobs.ledger import MAX_ROWS, Ledger
from jobs.s3.client import Location, Store, record_location
from producer.records.fenced_put import put_if_ours
from producer.records.job_record import write_reopened
from producer.records.manifest import damage_named, pack, unpack

MAX_HELD = 10_000
"""Failures of one job that stay in Redis: some 4 MB."""
SPILL_ROWS = 2_500
_MAX_PART_BYTES = 64_000_000


def failures_of(job: Job, *, ledger: Ledger, store: Store) -> Iterator[tuple[int, Failure]]:
    """Each failed image once, with its last failure, in no order. One part in memory at a time."""
    seen = bytearray(job.total)

    def is_new(index: int) -> bool:
        """A scan may give a row twice; a job may grow."""
        seen.extend(bytes(max(0, index + 1 - len(seen))))
        known, seen[index] = seen[index], 1
        return not known

    for index, failure in ledger.failures(job.id):
        if is_new(index):
            yield index, failure
    for number in reversed(range(ledger.job(job.id).spills)):  # by now: with what has left the ledger meanwhile
        for index, failure in _read(store, job, number):
            if is_new(index) and ledger.states(job.id, index, 1) == [ImageState.FAILED]:
                yield index, failure


def spill(epoch: int, job: Job, *, ledger: Ledger, store: Store) -> bool:
    """Moves `SPILL_ROWS` failures to S3 when the ledger holds more than `MAX_HELD`. Killed in between: done again.
    Raises `Fenced`."""
    if ledger.failures_held(job.id) <= MAX_HELD:
        return False
    rows = dict(itertools.islice(ledger.failures(job.id), SPILL_ROWS))

    def is_next() -> bool:
        ledger.check_leads(epoch)
        return ledger.job(job.id).spills == job.spills

    if not write_spill(job, job.spills, rows, store, is_next=is_next):
        return False
    return ledger.drop_spilled(epoch, job.id, job.spills, rows)


def write_spill(
    job: Job, number: int, rows: Mapping[int, Failure], store: Store, *, is_next: Callable[[], bool]
) -> bool:
    """One that counts is never replaced: its rows stand nowhere else. `is_next`: see `write_part`."""
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
    """All failures, sorted in a temporary file; a question for those of `count` images from index `first` on."""
    with contextlib.closing(sqlite3.connect("")) as table:
        table.execute("create table failures (image integer primary key, text text)")
        rows = ((index, failure.to_json()) for index, failure in failures_of(job, ledger=ledger, store=store))
        table.executemany("insert or replace into failures values (?, ?)", rows)

        def between(first: int, count: int) -> dict[int, Failure]:
            found = table.execute(
                "select image, text from failures where image >= ? and image < ? order by image", (first, first + count)
            )
            return {index: Failure.of(json.loads(text)) for index, text in found}

        yield between


def json_row(index: int, failure: Failure) -> str:
    return json.dumps({"index": index} | dataclasses.asdict(failure), ensure_ascii=False)


def retry(job: Job, code: str | None, *, ledger: Ledger, store: Store) -> int:
    """Failed images, all or those of one code, are open again. Safe to repeat. Returns how many changed."""
    chosen = (i for i, failure in failures_of(job, ledger=ledger, store=store) if code in (None, failure.code))
    changed = 0
    while rows := list(itertools.islice(chosen, MAX_ROWS)):
        if not changed:
            write_reopened(job, store)
        changed += ledger.reopen(job.id, rows, states=[ImageState.FAILED])
    return changed


def _read(store: Store, job: Job, number: int) -> Iterator[tuple[int, Failure]]:
    body, _ = store.get(_location(job, number), role="output", max_bytes=_MAX_PART_BYTES)
    with damage_named(f"Part {number} of the failures of job {job.id}"):
        rows = [json.loads(line) for line in unpack(body)]
        found = [(int(row["index"]), Failure.of(row)) for row in rows]
    yield from found


def _location(job: Job, number: int) -> Location:
    return record_location(job.destination, job.id, f"failures/{number:06d}.jsonl.gz")
