"""The manifest of a job: its images in numbered gzip JSONL parts in S3, in the order they were listed. Index i stands
in part i // PART_ROWS; every part but the last is full, so that no list of offsets is needed.

A backfill's parts are written while it is listed. A live job's lines wait in the ledger, so that nothing stands between
a new image and its worker; the dispatcher records them as parts when one is full and before the job closes."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from jobs.errors import OutputError
from jobs.job import Job, ManifestPart
from jobs.ledger import Ledger
from jobs.message import ImageTask
from jobs.s3.client import Location, S3Object, Store, record_location
from producer.records.fenced_put import put_if_ours

PART_ROWS = 10_000
MAX_PART_BYTES = 64_000_000
"""Far above what PART_ROWS keys of 1,024 bytes compress to."""
MAX_UNPACKED_BYTES = 256_000_000
"""Far above what PART_ROWS keys of 1,024 bytes take as JSON."""


def in_parts(rows: Iterable[S3Object], *, first_number: int) -> Iterator[tuple[ManifestPart, list[S3Object]]]:
    """Groups rows into parts of `PART_ROWS`."""
    stream = iter(rows)
    for number in itertools.count(first_number):
        batch = list(itertools.islice(stream, PART_ROWS))
        if not batch:
            return
        keys = [row.key for row in batch]
        yield ManifestPart(number, min(keys), max(keys), len(batch)), batch


def write_part(
    store: Store, job: Job, part: ManifestPart, rows: list[S3Object], *, is_next: Callable[[], bool]
) -> bool:
    """Safe to repeat: a part is written before the ledger counts it. `is_next`: whether the ledger still waits for it,
    from us. False, and nothing is written, when it does not."""
    first = part.number * PART_ROWS
    lines = [manifest_line(first + i, row) for i, row in enumerate(rows)]
    return _put_lines(store, job, part.number, lines, is_next)


def manifest_line(index: int, row: S3Object) -> str:
    fields = {"index": index, "key": row.key, "etag": row.etag, "size": row.size}
    return json.dumps(fields | ({"hint": row.hint} if row.hint else {}), ensure_ascii=False)


def record_live(job: Job, *, epoch: int, store: Store, ledger: Ledger) -> bool:
    """Makes a part of a live job's next lines. Killed in between, the next dispatcher writes the same part again. False
    when there was nothing to record. Raises `Fenced`."""
    lines = ledger.rows(job.id, first=0, count=PART_ROWS)
    if not lines:
        return False
    tasks = [_task(job, line) for line in lines]
    number = tasks[0].index // PART_ROWS  # not `job.parts`, which may be of a moment ago

    def is_next() -> bool:
        ledger.check_leads(epoch)
        return ledger.is_next_part(job.id, number)

    if not _put_lines(store, job, number, lines, is_next):
        return False
    keys = [task.key for task in tasks]
    return ledger.record_part(epoch, job.id, ManifestPart(number, min(keys), max(keys), len(lines)))


def read_part(store: Store, job: Job, number: int) -> list[ImageTask]:
    """The images of one part, in order of index."""
    body, _ = store.get(_location(job, number), role="output", max_bytes=MAX_PART_BYTES)
    with damage_named(f"Part {number} of the manifest of job {job.id}"):
        return [_task(job, line) for line in unpack(body)]


def pack(lines: Iterable[str]) -> bytes:
    """As gzip. The same lines give the same bytes."""
    return gzip.compress("\n".join(lines).encode(), compresslevel=5, mtime=0)


def unpack(body: bytes) -> list[bytes]:
    """What `pack` made, in lines. Raises `ValueError` or `zlib.error` for what is no gzip, not whole, or too much."""
    stream = zlib.decompressobj(zlib.MAX_WBITS | 16)
    text = stream.decompress(body, MAX_UNPACKED_BYTES)
    if not stream.eof:
        raise ValueError(f"it is not whole, or larger than {MAX_UNPACKED_BYTES:,} bytes")
    return text.splitlines()


@contextmanager
def damage_named(what: str) -> Iterator[None]:
    """Raises `OutputError` `manifest_damaged` where a record of ours is not what we wrote: it stands where others may
    write too."""
    try:
        yield
    except (ValueError, KeyError, TypeError, zlib.error) as exc:
        raise OutputError(
            f"{what} is damaged ({type(exc).__name__}: {exc}): restore it, or cancel the job and submit it again.",
            code="manifest_damaged",
        ) from exc


def read_unrecorded(job: Job, *, first: int, count: int, ledger: Ledger) -> list[ImageTask]:
    """Live images that stand in no part yet, the first of them being number `first`."""
    return [_task(job, line) for line in ledger.rows(job.id, first=first, count=count)]


def find_rows(
    job: Job, index: int, count: int, *, part: Callable[[int], Sequence[ImageTask]], ledger: Ledger
) -> Sequence[ImageTask]:
    """The image of that index and at most `count` - 1 behind it, wherever their rows stand by now: of one part, or of
    those that stand in none. `part`: a part by its number, as `read_part` gives it. Raises `OutputError`
    `manifest_damaged` for a row that stands nowhere."""
    while index >= (recorded := job.total - job.unrecorded):
        found = read_unrecorded(job, first=index - recorded, count=count, ledger=ledger)
        if found and found[0].index == index:
            return found
        job = ledger.job(job.id)
        if job.total - job.unrecorded == recorded:  # and no part was recorded meanwhile
            raise rows_lost(job)
    number, offset = divmod(index, PART_ROWS)
    tasks = part(number)
    if len(tasks) <= offset:
        raise OutputError(f"Part {number} of the manifest ends before image {index}.", code="manifest_damaged")
    return tasks[offset : offset + count]


def rows_lost(job: Job) -> OutputError:
    """Of a live job: its rows stand neither in a part nor in the ledger."""
    return OutputError(
        f"Rows of job {job.id} do not fit its manifest: `cutfleet audit {job.id}` says more.", code="manifest_damaged"
    )


def last_listed(store: Store, job: Job) -> str:
    """The last key of what was listed in the order of keys; empty when nothing was."""
    return read_part(store, job, job.parts - 1)[-1].key if job.parts else ""


@contextmanager
def keys_listed(store: Store, job: Job) -> Iterator[Callable[[str], bool]]:
    """Whether a key stands in a part already; the keys are kept in a temporary file."""
    with contextlib.closing(sqlite3.connect("")) as table:
        table.execute("create table keys (key text primary key) without rowid")
        for number in range(job.parts):
            table.executemany(
                "insert or ignore into keys values (?)", ((task.key,) for task in read_part(store, job, number))
            )
        yield lambda key: table.execute("select 1 from keys where key = ?", (key,)).fetchone() is not None


def _task(job: Job, line: str | bytes) -> ImageTask:
    row = json.loads(line)
    return ImageTask(job.id, row["index"], row["key"], row["etag"], row["size"], job.lane, row.get("hint", ""))


def _put_lines(store: Store, job: Job, number: int, lines: list[str], is_next: Callable[[], bool]) -> bool:
    return put_if_ours(
        store,
        _location(job, number),
        pack(lines),
        content_type="application/gzip",
        conditional=job.conditional,
        is_ours=is_next,
    )


def _location(job: Job, number: int) -> Location:
    return record_location(job.destination, job.id, f"manifest/{number:06d}.jsonl.gz")
