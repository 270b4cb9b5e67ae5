"""What a job leaves in S3 of itself, under TO/_cutfleet/JOB/, and what can be known of it from there alone.

job.json            source, destination, recipe, pace; `rows` of a live job that was submitted at once, as in a part
manifest/           numbered parts (`producer/records/manifest.py`); end.json once there is no more to come: total
report/             summary.json and the rest, written before the job closes (`producer/records/report.py`)
                    reopened.json: ETag of the summary that is no longer the last word
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from jobs.errors import JobError, OutputError
from jobs.job import Job, job_from_fields
from jobs.recipe import Recipe
from jobs.s3.client import RECORDS, Location, S3Object, Store, destination_prefix, record_location
from producer.records.manifest import manifest_line

MAX_RECORD_BYTES = 16_000_000
"""Far above a live job's thousand rows with keys of 1,024 bytes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """`job` as it was submitted. `body`: job.json as it stands. `rows`: of a live job, where it has no manifest yet.
    `total`: how many images, once no more can come. `closed`: its report is complete, and nothing was opened since."""

    job: Job
    body: bytes
    rows: tuple[S3Object, ...]
    total: int | None
    closed: bool


def write_record(job: Job, store: Store, *, rows: Sequence[S3Object] = ()) -> bool:
    """Writes job.json, which shows that the destination can be written; returns whether the store honours
    conditions. `rows`: of a live job, so that they stand in S3 before anybody is told that it was submitted."""
    record: dict[str, Any] = {"v": 1, "job": job.id, "created": job.created} | job.to_fields()
    record |= {"recipe": json.loads(job.recipe)}
    if rows:
        record["rows"] = [json.loads(manifest_line(index, row)) for index, row in enumerate(rows)]
    body = json.dumps(record, indent=None if rows else 1, ensure_ascii=False).encode()
    return store.honours_conditions(record_location(job.destination, job.id, "job.json"), body)


def write_end(job: Job, total: int, store: Store) -> None:
    """The manifest is complete."""
    body = json.dumps({"total": total}).encode()
    store.put(record_location(job.destination, job.id, "manifest/end.json"), body, content_type="application/json")


def write_reopened(job: Job, store: Store) -> None:
    """Before images of a job that may be closed are open again: what Redis loses then is not what its report says."""
    summary = store.head(record_location(job.destination, job.id, "report/summary.json"), role="output")
    if summary is not None:
        place = record_location(job.destination, job.id, "report/reopened.json")
        store.put(place, json.dumps({"summary": summary.etag}).encode(), content_type="application/json")


def read_record(place: Location, store: Store) -> Record:
    """`place`: s3://BUCKET/TO/_cutfleet/JOB/. Raises `JobError` when there is none."""
    to, job_id = split_place(place)
    body, _ = _read(store, Location(place.bucket, f"{to}{RECORDS}/{job_id}/job.json"))
    if not body:
        raise JobError(f"There is no job.json under {place}: name the folder of one job.", code="record_missing")
    fields = json.loads(body)
    rows = tuple(S3Object(r["key"], r["etag"], r["size"], hint=r.get("hint", "")) for r in fields.pop("rows", ()))
    recipe = Recipe.from_json(json.dumps(fields["recipe"])).to_json()
    job = job_from_fields(job_id, fields | {"recipe": recipe, "created": str(fields["created"])})
    report, etag = _read(store, record_location(job.destination, job_id, "report/summary.json"))
    reopened, _ = _read(store, record_location(job.destination, job_id, "report/reopened.json"))
    end, _ = _read(store, record_location(job.destination, job_id, "manifest/end.json"))
    total: int | None = len(rows) or None
    for known in (end, report):
        total = json.loads(known)["total"] if known else total
    closed = bool(report) and not (reopened and json.loads(reopened)["summary"] == etag)
    return Record(job=job, body=body, rows=rows, total=total, closed=closed)


def part_numbers(job: Job, store: Store) -> list[int]:
    """Of the parts that are in S3."""
    pages = store.list_pages(record_location(job.destination, job.id, "manifest/"), role="output")
    names = (found.key.rpartition("/")[2] for objects, _ in pages for found in objects)
    return sorted(int(name.partition(".")[0]) for name in names if name.endswith(".jsonl.gz"))


def split_place(place: Location) -> tuple[str, str]:
    """Prefix of the destination, and the job's id. Raises `JobError`."""
    to, _, job_id = place.key.rstrip("/").rpartition(f"{RECORDS}/")
    if not job_id or "/" in job_id or destination_prefix(f"s3://{place.bucket}/{to}").key != to:
        raise JobError(f"{place} is no job's folder: write s3://BUCKET/TO/{RECORDS}/JOB/.", code="record_missing")
    return to, job_id


def _read(store: Store, location: Location) -> tuple[bytes, str]:
    """Body and ETag; both empty when there is none."""
    try:
        return store.get(location, role="output", max_bytes=MAX_RECORD_BYTES)
    except OutputError as exc:
        if exc.code != "output_missing":
            raise
        return b"", ""
