"""Which images need no look at the destination, image by image, because its listing and the report of the last
job there tell already:

  new       nothing stands under the cutout's name: the worker does not look for it
  known     cutout, mask and renditions are there, not written since the last job closed, and it says that it made them
            from this ETag by this recipe: skipped while it is listed, no worker hears of it
  neither   the worker looks, as at everything when nothing can be told

Nothing can be told where no running worker, or several that differ, say which model they serve, or where the last job,
or one that worked on the same names meanwhile, made its images by another recipe, or may have: of a job that Redis
lost, or whose record can't be read, nobody knows. Listing and report are kept in a temporary file. The store's clock
and the dispatcher's must agree to a second.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jobs.catalogue import RENDER
from jobs.errors import CutfleetError, ImageError, OutputError, SettingsError
from jobs.job import Job
from jobs.ledger import Ledger
from jobs.message import Hint
from jobs.recipe import PIPELINE_VERSION, Recipe
from jobs.s3.client import (
    RECORDS,
    Location,
    S3Object,
    Store,
    destination_prefix,
    image_names,
    record_location,
    rendition_names,
)
from jobs.s3.listing import LISTERS, list_side_by_side
from producer.records.manifest import unpack

log = logging.getLogger(__name__)

MAX_JOBS = 500
"""Jobs that a destination may remember; with more, their records are not read."""
WORTH = 50
"""Objects listed at the destination for each image that is asked for, at most: a request lists a thousand."""
_CLOCK_S = 2.0
"""A listing's times are cut to seconds, and clocks may be one apart."""
_MAX_BYTES = 64_000_000
_NOT_OURS = (
    *(ImageError, SettingsError, ValueError, KeyError, TypeError, AttributeError),
    *(OverflowError, RecursionError, zlib.error),
)
"""What reading a record raises that somebody else wrote, or half of which is lost."""


class _Unreadable(CutfleetError):
    """What a job left of itself is not what we wrote."""

    code = "record_unreadable"


@dataclasses.dataclass(frozen=True)
class _Record:
    """What a job left of itself. `closed` None: it has no summary yet. `made`: the fingerprints it made images by."""

    job: str
    source: str
    destination: str
    lane: str
    created: float
    closed: float | None
    review_of: str
    made: tuple[str, ...]

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> _Record:
        """Of summary.json or job.json."""
        closed = fields.get("closed")
        return cls(
            job=str(fields["job"]),
            source=str(Location.parse(fields["source"])),
            destination=str(fields["destination"]),
            lane=str(fields["lane"]),
            created=float(fields["created"]),
            closed=None if closed is None else float(closed),
            review_of=str(fields.get("review_of", "")),
            made=tuple(fields.get("tally", {}).get("made", {})),
        )


class Known:
    """`fingerprint`: of what is known, empty where nothing is."""

    def __init__(self, job: Job, recipe: Recipe, table: sqlite3.Connection, *, closed: float, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self._is_empty = _is_empty(table)
        self._job = job
        self._recipe = recipe
        self._table = table
        self._written_before = closed - _CLOCK_S

    def hint(self, row: S3Object) -> Hint:
        """What is known of an image. One that is archived is so only where it is new: another may be done."""
        if self._is_empty:
            return row.hint or "new"
        names = image_names(self._job.source, self._job.destination, row.key)
        written = self._written(names.cutout)
        if written is None:
            return row.hint or "new"
        if not self.fingerprint or not row.etag or not self._was_made(row):
            return ""
        try:
            renditions = rendition_names(self._recipe, self._job.source, self._job.destination, row.key)
        except OutputError:
            return ""
        times = [written, *map(self._written, (names.mask, *renditions.values()))]
        return "known" if all(time is not None and time <= self._written_before for time in times) else ""

    def _written(self, place: Location) -> float | None:
        found = self._table.execute("select written from outputs where key = ?", (place.key,)).fetchone()
        return None if found is None else float(found[0])

    def _was_made(self, row: S3Object) -> bool:
        found = self._table.execute("select etag from made where key = ?", (row.key,)).fetchone()
        return found is not None and str(found[0]) == row.etag


@contextmanager
def look_up(job: Job, store: Store, ledger: Ledger, *, at_least: int, whole: bool) -> Iterator[Known | None]:
    """What can be told of the images of `job`, which has `at_least` so many, and no more if they are the `whole`.
    None when listing the destination would cost more than it tells. Without conditional writes nothing is told: what is
    new now may not be so when its turn comes."""
    recipe = Recipe.from_json(job.recipe)
    limit = WORTH * at_least if whole else None
    if not job.conditional or job.model == RENDER:
        yield None
        return
    with contextlib.closing(sqlite3.connect("", isolation_level=None)) as table:
        table.execute("create table outputs (key text primary key, written real) without rowid")
        table.execute("create table made (key text primary key, etag text) without rowid")
        if not _list_outputs([_folder(job, "cutouts")], table, store, limit):
            yield None
            return
        tells_nothing = job.webhook_images or _is_empty(table)
        fingerprint = "" if tells_nothing else served_fingerprint(recipe, ledger)
        closed = None
        if fingerprint:
            closed = _read_last(job, table, fingerprint=fingerprint, store=store, ledger=ledger, limit=limit)
        yield Known(job, recipe, table, closed=closed or 0, fingerprint=fingerprint if closed else "")


def served_fingerprint(recipe: Recipe, ledger: Ledger) -> str:
    """Of this recipe with the model as it is served now; empty when that can't be told."""
    served = {
        (facts["revision"], facts["input_size"], facts["pipeline"])
        for facts in ledger.workers().values()
        if facts["model"] == recipe.model and "pipeline" in facts
    }
    if len(served) != 1:
        return ""
    revision, size, pipeline = served.pop()
    if int(pipeline) != PIPELINE_VERSION:
        return ""
    height, width = map(int, size.split("x"))
    return recipe.fingerprint(model_revision=revision, input_size=(height, width))


def made_line(key: str, etag: str) -> str:
    """One line of report/made-NNNNNN.jsonl.gz."""
    return json.dumps({"key": key, "etag": etag}, ensure_ascii=False)


def _folder(job: Job, name: str) -> Location:
    """Where outputs of the job stand, as narrow as its source says."""
    to, source = destination_prefix(job.destination), Location.parse(job.source)
    return Location(to.bucket, f"{to.key}{name}/{source.key.rpartition('/')[2]}")


def _beside(job: Job) -> list[Location]:
    """Where masks and renditions stand."""
    to, recipe = destination_prefix(job.destination), Recipe.from_json(job.recipe)
    renditions = {Location(to.bucket, to.key + recipe.rendition_folder(rendition)) for rendition in recipe.renditions}
    return [_folder(job, "masks"), *renditions]


def _list_outputs(places: Iterable[Location], table: sqlite3.Connection, store: Store, limit: int | None) -> bool:
    """False when there are more than `limit`."""
    table.execute("begin")
    left = limit
    for place in places:
        for found in list_side_by_side(store, place, role="output"):
            table.execute("insert or replace into outputs values (?, ?)", (found.key, found.modified))
            if left is not None:
                left -= 1
                if left < 0:
                    table.execute("rollback")
                    return False
    table.execute("commit")
    return True


def _is_empty(table: sqlite3.Connection) -> bool:
    return table.execute("select 1 from outputs limit 1").fetchone() is None


def _read_last(
    job: Job, table: sqlite3.Connection, *, fingerprint: str, store: Store, ledger: Ledger, limit: int | None
) -> float | None:
    """Puts into `table` what the last job made. Returns when that one was closed; None where nothing can be told."""
    try:
        last = _last_job(job, fingerprint, store, ledger)
        if last is None or not _list_outputs(_beside(job), table, store, limit):
            return None
        _read_made(job, last, table, store)
        return last.closed
    except _Unreadable as exc:
        log.warning("looked at image by image: %s", exc, extra={"action": "list", "job": job.id, "code": exc.code})
        return None


def _last_job(job: Job, fingerprint: str, store: Store, ledger: Ledger) -> _Record | None:
    """The newest closed job on the same names, if it and all that worked on them meanwhile, or do now, made their
    images by this fingerprint. Who is open is asked first: a job that closes then is one that has a summary. Raises
    `_Unreadable`."""
    working = {other.id: other for other in ledger.open_jobs()}
    to = destination_prefix(job.destination)
    folders = [
        folder.rstrip("/").rpartition("/")[2]
        for _, folders in store.list_pages(Location(to.bucket, f"{to.key}{RECORDS}/"), role="output", delimiter="/")
        for folder in folders
    ]
    others = [folder for folder in folders if folder not in (job.id, "doctor")]
    if not others or len(others) > MAX_JOBS:
        return None
    with concurrent.futures.ThreadPoolExecutor(LISTERS) as pool:
        records = list(pool.map(lambda other: _record(job, other, store), others))
    alike = [
        record
        for record in records
        if record is not None and not record.review_of and _same_names(job, record.source, record.destination)
    ]
    closed = [(record.closed, record) for record in alike if record.closed is not None]
    if not closed:
        return None
    closed_at, last = max(closed, key=lambda found: found[1].created)
    if any(at >= last.created and record.made != (fingerprint,) for at, record in closed):
        return None
    lost = [record for record in alike if record.closed is None and record.job not in working]
    if any(record.created < closed_at and _began(record, job, store) for record in lost):
        return None
    if not all(_makes_by(fingerprint, other, job, ledger) for other in working.values()):
        return None
    return last


def _makes_by(fingerprint: str, other: Job, job: Job, ledger: Ledger) -> bool:
    """Whether an open job has made, and will make, nothing else under the names of `job`."""
    if other.id == job.id or other.review_of or not _same_names(job, other.source, other.destination):
        return True
    try:
        recipe = Recipe.from_json(other.recipe)
    except SettingsError:  # a later version's: nobody here knows what it makes
        return False
    return {*ledger.tally(other.id).made, served_fingerprint(recipe, ledger)} == {fingerprint}


def _began(record: _Record, job: Job, store: Store) -> bool:
    """Whether an unknown job may have made images: what was never listed was never fed."""
    if record.lane == "live":
        return True
    manifest = record_location(job.destination, record.job, "manifest/")
    return any(found for found, _ in store.list_pages(manifest, role="output"))


def _record(job: Job, other: str, store: Store) -> _Record | None:
    """Its summary once it is closed, else what it was submitted with; None when there is neither. Raises
    `_Unreadable`."""
    for name in ("report/summary.json", "job.json"):
        place = record_location(job.destination, other, name)
        with _reading(place):
            try:
                body, _ = store.get(place, role="output", max_bytes=_MAX_BYTES)
            except OutputError as exc:
                if exc.code != "output_missing":
                    raise
            else:
                return _Record.of(json.loads(body))
    return None


@contextmanager
def _reading(place: Location) -> Iterator[None]:
    """Raises `_Unreadable` when what stands there can't be read, or is not what we wrote."""
    try:
        yield
    except _NOT_OURS as exc:
        raise _Unreadable(
            f"{place} can't be read ({type(exc).__name__}: {exc}): restore it, or delete the folder of its job."
        ) from exc


def _same_names(job: Job, source: str, destination: str) -> bool:
    """Whether both give outputs the same names: the same destination, and below the same folder."""
    ours, theirs = Location.parse(job.source), Location.parse(source)
    same_folder = ours.key.rpartition("/")[0] == theirs.key.rpartition("/")[0]
    return job.destination == destination and ours.bucket == theirs.bucket and same_folder


def _read_made(job: Job, last: _Record, table: sqlite3.Connection, store: Store) -> None:
    """Raises `_Unreadable`."""
    report = record_location(job.destination, last.job, "report/made-")
    table.execute("begin")
    for found in (found for page, _ in store.list_pages(report, role="output") for found in page):
        place = Location(report.bucket, found.key)
        with _reading(place):
            body, _ = store.get(place, role="output", max_bytes=_MAX_BYTES)
            rows = [json.loads(line) for line in unpack(body)]
            made = [(str(row["key"]), str(row["etag"])) for row in rows]
            table.executemany("insert or replace into made values (?, ?)", made)
    table.execute("commit")
