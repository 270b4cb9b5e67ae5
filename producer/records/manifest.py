"""The manifest of a job: its images in numbered gzip JSONL parts in S3, in the order of listing. Index i is in part
i // PART_ROWS; every part but the last is full, so no list of offsets is needed.

Listing a backfill writes its parts. The rows of a live job wait in Redis, so that a new image reaches its worker
without a write to S3; the dispatcher records them as parts when one is full, and before the job closes."""

from __future__ import annotations

import contextlib
import functools
import gzip
import itertools
import json
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from jobs.envelope import message_row
from jobs.errors import OutputError
from jobs.job import Job, ManifestPart
from jobs.ledger import Ledger
from jobs.message import ImageTask
from jobs.s3.client import S3Object, Store
from jobs.s3.location import Location
from producer.records.fenced_put import put_if_ours

PART_ROWS = 10_000
MAX_PART_BYTES = 64_000_000
"""Far above the compressed size of PART_ROWS keys of 1,024 bytes."""
MAX_UNPACKED_BYTES = 256_000_000
"""Far above the size of PART_ROWS keys of 1,024 bytes as JSON."""


class ManifestReader:
    """Reads a job's images by index, wherever their rows are: in a part, or, of a live job, still in Redis. Keeps one
    part in memory. Safe for threads."""

    def __init__(self, job: Job, store: Store, ledger: Ledger) -> None:
        self._job = job
        self._store = store
        self._ledger = ledger
        self._read_part = functools.lru_cache(maxsize=1)(functools.partial(read_part, store, job))

    def find(self, index: int, count: int = 1) -> Sequence[ImageTask]:
        """Return the image of that index and up to `count` - 1 after it, fewer at the end of a part. Raises
        `OutputError` `manifest_damaged` for a row that is nowhere."""
        job = self._job
        while index >= job.recorded:
            tasks = read_unrecorded(job, first=index - job.recorded, count=count, ledger=self._ledger)
            if tasks and tasks[0].index == index:
                return tasks
            recorded, job = job.recorded, self._ledger.jobs.get(job.id)
            if job.recorded == recorded:  # no part was recorded in the meantime either
                raise rows_lost(job)
            self._job = job
        number, offset = divmod(index, PART_ROWS)
        tasks = self._read_part(number)
        if len(tasks) <= offset:
            raise OutputError(f"Part {number} of the manifest ends before image {index}.", code="manifest_damaged")
        return tasks[offset : offset + count]

    def all(self) -> Iterator[Sequence[ImageTask]]:
        """Yield the images that the job has now, in order of index, at most one part at a time."""
        first, total = 0, self._ledger.jobs.get(self._job.id).total
        while first < total:
            tasks = self.find(first, PART_ROWS - first % PART_ROWS)
            yield tasks
            first += len(tasks)


def in_parts(rows: Iterable[S3Object], *, first_number: int) -> Iterator[tuple[ManifestPart, list[S3Object]]]:
    """Group rows into parts of `PART_ROWS`."""
    stream = iter(rows)
    for number in itertools.count(first_number):
        batch = list(itertools.islice(stream, PART_ROWS))
        if not batch:
            return
        yield part_of(number, [row.key for row in batch]), batch


def part_of(number: int, keys: Sequence[str]) -> ManifestPart:
    return ManifestPart(number, min(keys), max(keys), len(keys))


def write_part(
    store: Store, job: Job, part: ManifestPart, rows: Sequence[S3Object], *, is_next: Callable[[], bool]
) -> bool:
    """Write a part before the ledger counts it; safe to repeat. `is_next`: whether the ledger still expects this part
    from us. Return False, and write nothing, when it does not."""
    first = part.number * PART_ROWS
    lines = [manifest_line(first + offset, row) for offset, row in enumerate(rows)]
    return _put_lines(store, job, part.number, lines, is_next)


def manifest_line(index: int, row: S3Object) -> str:
    fields = {"index": index, "key": row.key, "etag": row.etag, "size": row.size}
    return json.dumps(fields | ({"hint": row.hint} if row.hint else {}), ensure_ascii=False)


def live_row(index: int, row: S3Object, job: Job) -> tuple[str, str, str]:
    """Return queue, message and manifest line of one live image."""
    task = ImageTask(job.id, index, row.key, row.etag, row.size, job.lane, row.hint)
    return (*message_row(task, job), manifest_line(index, row))


def record_live(job: Job, *, epoch: int, store: Store, ledger: Ledger) -> bool:
    """Record the next rows of a live job as a part. A dispatcher that takes over writes the same part again. Return
    False when there was nothing to record. Raises `Fenced`."""
    lines = ledger.images.unrecorded_rows(job.id, first=0, count=PART_ROWS)
    if not lines:
        return False
    tasks = [_task(job, line) for line in lines]
    number = tasks[0].index // PART_ROWS  # not `job.parts`, which may be outdated

    def is_next() -> bool:
        ledger.dispatch.check_lock(epoch)
        return ledger.jobs.is_next_part(job.id, number)

    if not _put_lines(store, job, number, lines, is_next):
        return False
    return ledger.dispatch.record_part(epoch, job.id, part_of(number, [task.key for task in tasks]))


def read_part(store: Store, job: Job, number: int) -> list[ImageTask]:
    """Return the images of one part in order of index."""
    body, _ = store.get(_location(job, number), role="output", max_bytes=MAX_PART_BYTES)
    with damage_named(f"Part {number} of the manifest of job {job.id}"):
        return [_task(job, line) for line in unpack(body)]


def read_unrecorded(job: Job, *, first: int, count: int, ledger: Ledger) -> list[ImageTask]:
    """Return live images that are in no part yet, skipping the first `first` of them."""
    return [_task(job, line) for line in ledger.images.unrecorded_rows(job.id, first=first, count=count)]


def pack(lines: Iterable[str]) -> bytes:
    """Compress lines as gzip; deterministic."""
    return gzip.compress("\n".join(lines).encode(), compresslevel=5, mtime=0)


def unpack(body: bytes) -> list[bytes]:
    """Return the lines of `pack`. Raises `ValueError` or `zlib.error` for a damaged, truncated or oversized body."""
    stream = zlib.decompressobj(zlib.MAX_WBITS | 16)
    text = stream.decompress(body, MAX_UNPACKED_BYTES)
    if not stream.eof:
        raise ValueError(f"it is truncated, or larger than {MAX_UNPACKED_BYTES:,} bytes")
    return text.splitlines()


@contextmanager
def damage_named(what: str) -> Iterator[None]:
    """Raise `OutputError` `manifest_damaged` for a record that we did not write so: others may write there too."""
    try:
        yield
    except (ValueError, KeyError, TypeError, zlib.error) as exc:
        raise OutputError(
            f"{what} is damaged ({type(exc).__name__}: {exc}): restore it, or cancel the job and submit it again.",
            code="manifest_damaged",
        ) from exc


def rows_lost(job: Job) -> OutputError:
    """Return the error for rows of a live job that are neither in a part nor in Redis."""
    return OutputError(
        f"Rows of job {job.id} do not match its manifest: run `cutfleet audit {job.id}`.", code="manifest_damaged"
    )


def last_listed_key(store: Store, job: Job) -> str:
    """Return the last key of a job that was listed in key order; empty when nothing was."""
    return read_part(store, job, job.parts - 1)[-1].key if job.parts else ""


@contextmanager
def listed_keys(store: Store, job: Job) -> Iterator[Callable[[str], bool]]:
    """Yield a function that tells whether a key is in a part already. The keys are in a temporary file."""
    with contextlib.closing(sqlite3.connect("")) as table:
        table.execute("create table keys (key text primary key) without rowid")
        for number in range(job.parts):
            keys = ((task.key,) for task in read_part(store, job, number))
            table.executemany("insert or ignore into keys values (?)", keys)
        yield lambda key: table.execute("select 1 from keys where key = ?", (key,)).fetchone() is not None


def _task(job: Job, line: str | bytes) -> ImageTask:
    row = json.loads(line)
    return ImageTask(job.id, row["index"], row["key"], row["etag"], row["size"], job.lane, row.get("hint", ""))


def _put_lines(store: Store, job: Job, number: int, lines: Sequence[str], is_next: Callable[[], bool]) -> bool:
    return put_if_ours(
        store,
        _location(job, number),
        pack(lines),
        content_type="application/gzip",
        conditional=job.conditional,
        is_ours=is_next,
    )


def _location(job: Job, number: int) -> Location:
    return job.record_path(f"manifest/{number:06d}.jsonl.gz")
