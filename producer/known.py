"""Which pictures need no look at the destination, picture by picture, because its listing and the report of the last
job there tell already:

  new       nothing stands under the cutout's name: the worker does not look for it
  known     cutout, mask and renditions are there, not written since the last job closed, and it says that it made them
            from this ETag by this recipe: skipped while it is listed, no worker hears of it
  neither   the worker looks, as at everything when nothing can be told

Nothing can be told where no running worker, or several that differ, say which model they serve, or where the last job,
or one that worked on the same names meanwhile, made its pictures by another recipe, or may have: of a job that Redis
lost nobody knows. Listing and report are kept in a temporary file. The store's clock and the dispatcher's must agree to
a second.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jobs.errors import OutputError
from jobs.job import Job
from jobs.ledger import Ledger
from jobs.message import Hint
from jobs.presets import RENDER
from jobs.recipe import PIPELINE_VERSION, Recipe
from jobs.store import (
    RECORDS,
    Location,
    S3Object,
    Store,
    destination_prefix,
    image_names,
    record_location,
    rendition_names,
)
from producer.listing import LISTERS, list_side_by_side
from producer.manifest import damage_named, unpack

MAX_JOBS = 500
"""Jobs that a destination may remember; with more, their records are not read."""
WORTH = 50
"""Objects listed at the destination for each picture that is asked for, at most: a request lists a thousand."""
_CLOCK_S = 2.0
"""A listing's times are cut to seconds, and clocks may be one apart."""
_MAX_BYTES = 64_000_000


@dataclasses.dataclass(frozen=True)
class _Last:
    """The last job that worked on the same names."""

    job: str
    closed: float


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
        """What is known of a picture. One that is archived is so only where it is new: another may be done."""
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
    """What can be told of the pictures of `job`, which has `at_least` so many, and no more if they are the `whole`.
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
        tells_nothing = job.webhook_pictures or _is_empty(table)
        fingerprint = "" if tells_nothing else served_fingerprint(recipe, ledger)
        last = _last_job(job, fingerprint, store, ledger) if fingerprint else None
        if last is None or not _list_outputs(_beside(job, recipe), table, store, limit):
            yield Known(job, recipe, table, closed=0, fingerprint="")
            return
        _read_made(job, last, table, store)
        yield Known(job, recipe, table, closed=last.closed, fingerprint=fingerprint)


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


def _beside(job: Job, recipe: Recipe) -> list[Location]:
    """Where masks and renditions stand."""
    to = destination_prefix(job.destination)
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


def _last_job(job: Job, fingerprint: str, store: Store, ledger: Ledger) -> _Last | None:
    """The newest closed job on the same names, if it and all that worked on them meanwhile, or do now, made their
    pictures by this fingerprint. Who is open is asked first: a job that closes then is one that has a summary."""
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
    alike = [record for record in records if record is not None and _same_names(job, record) and _makes(record)]
    closed = [record for record in alike if record.get("closed") is not None]
    if not closed:
        return None
    last = max(closed, key=lambda record: float(record["created"]))
    meanwhile = [record for record in closed if float(record["closed"]) >= float(last["created"])]
    if any(list(record.get("tally", {}).get("made", {})) != [fingerprint] for record in meanwhile):
        return None
    lost = [record for record in alike if record.get("closed") is None and str(record["job"]) not in working]
    if any(float(record["created"]) < float(last["closed"]) and _began(record, job, store) for record in lost):
        return None
    if not all(_makes_by(fingerprint, other, job, ledger) for other in working.values()):
        return None
    return _Last(str(last["job"]), float(last["closed"]))


def _makes_by(fingerprint: str, other: Job, job: Job, ledger: Ledger) -> bool:
    """Whether an open job has made, and will make, nothing else under the names of `job`."""
    place = {"source": other.source, "destination": other.destination}
    if other.id == job.id or other.review_of or not _same_names(job, place):
        return True
    made = {*ledger.tally(other.id).made, served_fingerprint(Recipe.from_json(other.recipe), ledger)}
    return made == {fingerprint}


def _began(record: Mapping[str, Any], job: Job, store: Store) -> bool:
    """Whether an unknown job may have made pictures: what was never listed was never fed."""
    if record["lane"] == "live":
        return True
    manifest = record_location(job.destination, str(record["job"]), "manifest/")
    return any(found for found, _ in store.list_pages(manifest, role="output"))


def _record(job: Job, other: str, store: Store) -> Mapping[str, Any] | None:
    """Its summary once it is closed, else what it was submitted with; None when there is neither."""
    for name in ("report/summary.json", "job.json"):
        place = record_location(job.destination, other, name)
        with contextlib.suppress(OutputError):
            body, _ = store.get(place, role="output", max_bytes=_MAX_BYTES)
            return dict(json.loads(body))
    return None


def _makes(record: Mapping[str, Any]) -> bool:
    """A review writes no output."""
    return not record.get("review_of")


def _same_names(job: Job, record: Mapping[str, Any]) -> bool:
    """Whether both give outputs the same names: the same destination, and below the same folder."""
    ours, theirs = Location.parse(job.source), Location.parse(record["source"])
    same_folder = ours.key.rpartition("/")[0] == theirs.key.rpartition("/")[0]
    return job.destination == record["destination"] and ours.bucket == theirs.bucket and same_folder


def _read_made(job: Job, last: _Last, table: sqlite3.Connection, store: Store) -> None:
    report = record_location(job.destination, last.job, "report/made-")
    table.execute("begin")
    for found in (found for page, _ in store.list_pages(report, role="output") for found in page):
        body, _ = store.get(Location(report.bucket, found.key), role="output", max_bytes=_MAX_BYTES)
        with damage_named(f"{found.key} of job {last.job}"):
            rows = [json.loads(line) for line in unpack(body)]
            made = [(row["key"], row["etag"]) for row in rows]
        table.executemany("insert or replace into made values (?, ?)", made)
    table.execute("commit")
