"""The records of a job in S3, under TO/_cutfleet/JOB/, from which it can be rebuilt.

job.json            source, destination, recipe, limits; `rows` of a live job that was queued at once, as in a part
manifest/           numbered parts (`producer/records/manifest.py`); end.json with the total once it is complete
report/             summary.json and the rest, written before the job closes (`producer/records/report.py`);
                    reopened.json: ETag of the summary that is outdated, since images were reopened after it
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from jobs.errors import JobError, NotFound
from jobs.job import Job
from jobs.recipe import Recipe
from jobs.s3.client import S3Object, Store
from jobs.s3.location import Location, parse_destination
from jobs.s3.names import RECORDS, record_path
from producer.records.manifest import manifest_line

MAX_RECORD_BYTES = 64_000_000
"""Far above a live job's thousand rows with keys of 1,024 bytes."""
SUMMARY = "report/summary.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobRecord:
    """`job`: as it was submitted. `body`: of job.json. `rows`: of a live job without a manifest. `total`: number of
    images, once no more can come. `closed`: its report is complete, and no image was reopened since."""

    job: Job
    body: bytes
    rows: tuple[S3Object, ...]
    total: int | None
    closed: bool


def write_record(job: Job, store: Store, *, rows: Sequence[S3Object] = ()) -> bool:
    """Write job.json, which proves that the destination is writable; return whether the store supports conditional
    writes. `rows`: of a live job, so that they are in S3 before the submission is acknowledged."""
    record: dict[str, Any] = {"v": 1, "job": job.id, "created": job.created} | job.to_fields()
    record |= {"recipe": json.loads(job.recipe_json)}
    if rows:
        record["rows"] = [json.loads(manifest_line(index, row)) for index, row in enumerate(rows)]
    body = json.dumps(record, indent=None if rows else 1, ensure_ascii=False).encode()
    return store.supports_conditional_writes(job.record_path("job.json"), body)


def write_end(job: Job, total: int, store: Store) -> None:
    """Mark the manifest as complete."""
    body = json.dumps({"total": total}).encode()
    store.put(job.record_path("manifest/end.json"), body, content_type="application/json")


def write_reopened(job: Job, store: Store) -> None:
    """Mark the report as outdated. Call it before images of a job that may be closed are reopened: a rebuild after a
    loss of Redis must not trust that report."""
    summary = store.head(job.record_path(SUMMARY), role="output")
    if summary is not None:
        body = json.dumps({"summary": summary.etag}).encode()
        store.put(job.record_path("report/reopened.json"), body, content_type="application/json")


def read_record(folder: Location, store: Store) -> JobRecord:
    """`folder`: s3://BUCKET/TO/_cutfleet/JOB/. Raises `JobError` `record_missing`."""
    destination, job_id = split_folder(folder)
    body, _ = read_optional(store, record_path(destination, job_id, "job.json"))
    if not body:
        raise JobError(f"There is no job.json under {folder}: name the folder of one job.", code="record_missing")
    fields = json.loads(body)
    rows = tuple(S3Object(r["key"], r["etag"], r["size"], hint=r.get("hint", "")) for r in fields.pop("rows", ()))
    recipe = Recipe.from_json(json.dumps(fields["recipe"])).to_json()
    fields |= {"recipe": recipe, "created": str(fields["created"])}
    job = Job.from_fields(job_id, fields)
    report, etag = read_optional(store, job.record_path(SUMMARY))
    reopened, _ = read_optional(store, job.record_path("report/reopened.json"))
    end, _ = read_optional(store, job.record_path("manifest/end.json"))
    total: int | None = len(rows) or None
    for known in (end, report):
        total = json.loads(known)["total"] if known else total
    closed = bool(report) and not (reopened and json.loads(reopened)["summary"] == etag)
    return JobRecord(job=job, body=body, rows=rows, total=total, closed=closed)


def part_numbers(job: Job, store: Store) -> list[int]:
    """Return the numbers of the manifest parts that are in S3."""
    pages = store.list_pages(job.record_path("manifest/"), role="output")
    names = (found.key.rpartition("/")[2] for objects, _ in pages for found in objects)
    return sorted(int(name.partition(".")[0]) for name in names if name.endswith(".jsonl.gz"))


def split_folder(folder: Location) -> tuple[Location, str]:
    """Return the destination, and the job's id. Raises `JobError` `record_missing`."""
    to, _, job_id = folder.key.rstrip("/").rpartition(f"{RECORDS}/")
    destination = parse_destination(str(folder.at(to)))
    if not job_id or "/" in job_id or destination.key != to:
        raise JobError(f"{folder} is not a job's folder: write s3://BUCKET/TO/{RECORDS}/JOB/.", code="record_missing")
    return destination, job_id


def read_optional(store: Store, location: Location) -> tuple[bytes, str]:
    """Return body and ETag of a record; both empty when there is none."""
    try:
        return store.get(location, role="output", max_bytes=MAX_RECORD_BYTES)
    except NotFound:
        return b"", ""
