"""The skip index tells, from one listing of the destination and the last job's report, which images need no work:

  new       there is no cutout under the image's name: the worker need not look for one
  known     cutout, mask and renditions exist, unchanged since the last job closed, and its report says that this recipe
            made them from this ETag: skipped while listing, no worker is involved
  (empty)   the worker looks

It stays silent unless all running workers of the model serve the same weights, and the last job and every job that
worked on the same names since then used this recipe: a job that Redis lost, or whose record is unreadable, may have
used another one. Listing and report are in temporary files. The clocks of store and dispatcher must agree to a second.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import logging
import sqlite3
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jobs.errors import CutfleetError, ImageError, OutputError, SettingsError
from jobs.job import Job, JobKind
from jobs.ledger import Ledger
from jobs.message import Hint
from jobs.recipe import PIPELINE_VERSION, Recipe
from jobs.s3.client import S3Object, Store
from jobs.s3.listing import LISTERS
from jobs.s3.location import Location, parse_destination
from jobs.s3.names import RECORDS, record_path
from producer.records.destination_index import DestinationIndex, empty_index
from producer.records.job_record import SUMMARY
from producer.records.report import read_made, read_record_fields

log = logging.getLogger(__name__)

MAX_JOBS = 500
"""Records of more jobs at one destination are not read."""
MAX_LISTED_PER_IMAGE = 50
"""Objects listed at the destination for each image of a small request: one LIST returns a thousand."""
_CLOCK_S = 2.0
"""Listings truncate times to seconds, and clocks may differ by one."""
_UNREADABLE = (
    *(ImageError, SettingsError, ValueError, KeyError, TypeError, AttributeError),
    *(OverflowError, RecursionError, zlib.error),
)
"""Raised when a record is damaged, incomplete or not ours."""


class _RecordUnreadable(CutfleetError):
    code = "record_unreadable"


@dataclasses.dataclass(frozen=True)
class _PastJob:
    """A job by its records. `closed` None: it has no summary. `made`: fingerprints that made its images."""

    id: str
    source: Location
    destination: Location
    lane: str
    created: float
    closed: float | None
    is_preview: bool
    made: tuple[str, ...]

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> _PastJob:
        """`fields`: of summary.json or job.json."""
        closed = fields.get("closed")
        return cls(
            id=str(fields["job"]),
            source=Location.parse(fields["source"]),
            destination=parse_destination(fields["destination"]),
            lane=str(fields["lane"]),
            created=float(fields["created"]),
            closed=None if closed is None else float(closed),
            is_preview=bool(fields.get("review_of")),
            made=tuple(fields.get("tally", {}).get("made", {})),
        )


class SkipIndex:
    """`fingerprint`: of the images that it reports as known; empty if it reports none."""

    def __init__(
        self, job: Job, outputs: DestinationIndex, made: _MadeIndex, *, closed: float, fingerprint: str
    ) -> None:
        """`made`: of the last job. `closed`: when that job closed, as Unix time."""
        self.fingerprint = fingerprint
        self._is_empty = outputs.is_empty
        self._job = job
        self._outputs = outputs
        self._made = made
        self._written_before = closed - _CLOCK_S

    def hint(self, row: S3Object) -> Hint:
        """Return the hint for one image. An archived image keeps its hint only where it is new."""
        if self._is_empty:
            return row.hint or "new"
        paths = self._job.paths(row.key)
        written = self._outputs.modified(paths.cutout)
        if written is None:
            return row.hint or "new"
        if not self.fingerprint or not row.etag or self._made.get(row.key) != row.etag:
            return ""
        try:
            renditions = self._job.rendition_paths(row.key)
        except OutputError:
            return ""
        times = [written, *map(self._outputs.modified, (paths.mask, *renditions.values()))]
        return "known" if all(time is not None and time <= self._written_before for time in times) else ""


class _MadeIndex:
    """Key -> ETag of what a job made, in a temporary file."""

    def __init__(self, table: sqlite3.Connection) -> None:
        self._table = table

    def get(self, key: str) -> str | None:
        row = self._table.execute("select etag from made where key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def add(self, rows: Sequence[tuple[str, str]]) -> None:
        self._table.executemany("insert or replace into made values (?, ?)", rows)


@contextmanager
def build_skip_index(
    job: Job, store: Store, ledger: Ledger, *, at_least: int, is_whole: bool
) -> Iterator[SkipIndex | None]:
    """Yield the skip index of a job with `at_least` so many images, and no more if `is_whole`. None when listing the
    destination would cost more than it saves, and without conditional writes: `new` may be outdated when a worker takes
    the image."""
    if not job.conditional or job.kind is not JobKind.CUT:
        yield None
        return
    limit = MAX_LISTED_PER_IMAGE * at_least if is_whole else None
    with empty_index() as outputs, _empty_made_index() as made:
        if not outputs.add([_output_prefix(job, "cutouts")], store, limit=limit):
            yield None
            return
        is_silent = job.webhook_images or outputs.is_empty
        fingerprint = "" if is_silent else served_fingerprint(job.recipe, ledger)
        closed = None
        if fingerprint:
            closed = _read_last_job(job, outputs, made, fingerprint, store=store, ledger=ledger, limit=limit)
        yield SkipIndex(job, outputs, made, closed=closed or 0, fingerprint=fingerprint if closed else "")


def served_fingerprint(recipe: Recipe, ledger: Ledger) -> str:
    """Return the fingerprint of this recipe with the model as it is served now; empty if workers differ or none
    runs."""
    served = {
        (beat["revision"], beat["input_size"], beat["pipeline"])
        for beat in ledger.fleet.workers().values()
        if beat["model"] == recipe.model and "pipeline" in beat
    }
    if len(served) != 1:
        return ""
    revision, size, pipeline = served.pop()
    if int(pipeline) != PIPELINE_VERSION:
        return ""
    height, width = map(int, size.split("x"))
    return recipe.fingerprint(model_revision=revision, input_size=(height, width))


@contextmanager
def _empty_made_index() -> Iterator[_MadeIndex]:
    with contextlib.closing(sqlite3.connect("")) as table:
        table.execute("create table made (key text primary key, etag text) without rowid")
        yield _MadeIndex(table)


def _output_prefix(job: Job, folder: str) -> Location:
    """Return the prefix of the job's outputs in `folder`, as narrow as its source allows."""
    return job.destination.below(f"{folder}/{job.source.key.rpartition('/')[2]}")


def _other_output_prefixes(job: Job) -> list[Location]:
    """Return the prefixes of masks and renditions."""
    recipe = job.recipe
    renditions = {job.destination.below(recipe.rendition_folder(rendition)) for rendition in recipe.renditions}
    return [_output_prefix(job, "masks"), *renditions]


def _read_last_job(
    job: Job,
    outputs: DestinationIndex,
    made: _MadeIndex,
    fingerprint: str,
    *,
    store: Store,
    ledger: Ledger,
    limit: int | None,
) -> float | None:
    """Add what the last job made to both indexes. Return when it closed; None if nothing is known about it."""
    try:
        last = _last_job(job, fingerprint, store, ledger)
        if last is None or not outputs.add(_other_output_prefixes(job), store, limit=limit):
            return None
        _read_made(job, last, made, store)
        return last.closed
    except _RecordUnreadable as exc:
        log.warning("no skip index, workers look: %s", exc, extra={"action": "list", "job": job.id, "code": exc.code})
        return None


def _last_job(job: Job, fingerprint: str, store: Store, ledger: Ledger) -> _PastJob | None:
    """Return the newest closed job on the same names, if it and every job that worked on them since then made its
    images by this fingerprint. Open jobs are read first: one that closes meanwhile has a summary. Raises
    `_RecordUnreadable`."""
    working = {other.id: other for other in ledger.jobs.open()}
    past = [other for other in _past_jobs(job, store) if not other.is_preview and _has_same_names(job, other)]
    closed = [(other.closed, other) for other in past if other.closed is not None]
    if not closed:
        return None
    closed_at, last = max(closed, key=lambda pair: pair[1].created)
    if any(at >= last.created and other.made != (fingerprint,) for at, other in closed):
        return None
    lost = [other for other in past if other.closed is None and other.id not in working]
    if any(other.created < closed_at and _may_have_begun(other, job, store) for other in lost):
        return None
    return last if all(_makes_only(fingerprint, other, job, ledger) for other in working.values()) else None


def _past_jobs(job: Job, store: Store) -> list[_PastJob]:
    """Return the other jobs with records at the destination; none when there are more than `MAX_JOBS`."""
    records = job.destination.below(f"{RECORDS}/")
    pages = store.list_pages(records, role="output", delimiter="/")
    names = [folder.rstrip("/").rpartition("/")[2] for _, folders in pages for folder in folders]
    others = [name for name in names if name not in (job.id, "doctor")]
    if len(others) > MAX_JOBS:
        return []
    with concurrent.futures.ThreadPoolExecutor(LISTERS) as pool:
        found = pool.map(lambda name: _past_job(records.below(f"{name}/"), store), others)
        return [other for other in found if other is not None]


def _past_job(folder: Location, store: Store) -> _PastJob | None:
    """Return a job by its summary once it is closed, else by its job.json; None when there is neither. Raises
    `_RecordUnreadable`."""
    for name in (SUMMARY, "job.json"):
        location = folder.below(name)
        with _naming_damage(location):
            fields = read_record_fields(location, store)
            if fields is not None:
                return _PastJob.from_fields(fields)
    return None


def _makes_only(fingerprint: str, other: Job, job: Job, ledger: Ledger) -> bool:
    """Whether an open job makes nothing else under the names of `job`."""
    if other.id == job.id or other.kind is JobKind.PREVIEW or not _has_same_names(job, other):
        return True
    try:
        served = served_fingerprint(other.recipe, ledger)
    except SettingsError:  # a later version's recipe
        return False
    return {*ledger.jobs.stats(other.id).made, served} == {fingerprint}


def _may_have_begun(other: _PastJob, job: Job, store: Store) -> bool:
    """Whether a job that the ledger does not know may have made images: one that was never listed was never fed."""
    if other.lane == "live":
        return True
    manifest = record_path(job.destination, other.id, "manifest/")
    return any(objects for objects, _ in store.list_pages(manifest, role="output"))


def _has_same_names(job: Job, other: Job | _PastJob) -> bool:
    """Whether both give outputs the same names: the same destination, and the same folder of the source."""
    is_same_folder = job.source.bucket == other.source.bucket and job.source.folder == other.source.folder
    return is_same_folder and job.destination == other.destination


def _read_made(job: Job, last: _PastJob, made: _MadeIndex, store: Store) -> None:
    """Raises `_RecordUnreadable`."""
    prefix = record_path(job.destination, last.id, "report/made-")
    for found in (found for page, _ in store.list_pages(prefix, role="output") for found in page):
        location = prefix.at(found.key)
        with _naming_damage(location):
            made.add(read_made(location, store))


@contextmanager
def _naming_damage(location: Location) -> Iterator[None]:
    """Raises `_RecordUnreadable` for a record that can't be read, or is not what we write."""
    try:
        yield
    except _UNREADABLE as exc:
        raise _RecordUnreadable(
            f"{location} can't be read ({type(exc).__name__}: {exc}): restore it, or delete the folder of its job."
        ) from exc
