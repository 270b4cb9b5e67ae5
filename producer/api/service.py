"""What the HTTP API does with ledger and store. A request of at most `MAX_LIVE` images becomes a job whose images are
queued before the response; a larger prefix becomes a backfill that `producer/api/background_listing.py` lists.

`Idempotency-Key` reserves the job's id first, for a day: a process may be killed at any line, and the same request
still creates one job.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import secrets
import time
from collections.abc import Mapping
from typing import Any

from jobs.errors import CutfleetError
from jobs.job import ImageState, Job
from jobs.ledger import Ledger
from jobs.ledger.jobs import MAX_LIVE
from jobs.message import ImageTask
from jobs.s3.client import S3Object, Store
from producer.api.auth import ApiKey
from producer.api.models import Result
from producer.records.job_record import write_record
from producer.records.manifest import ManifestReader, read_unrecorded
from producer.submission.request import Request
from producer.submission.submit import draft_job, queue_live, read_head
from producer.submission.validation import check_request

LINK_S = 3600
PARALLEL_LOOKUPS = 8
MINUTE_S = 60


class KeyReused(CutfleetError):
    """An Idempotency-Key came with another body before."""

    code = "idempotency_key_reused"


class RateLimited(CutfleetError):
    """The API key has used up its calls of this minute. `wait_s`: until the next minute."""

    code = "rate_limited"

    def __init__(self, message: str, *, wait_s: int) -> None:
        super().__init__(message)
        self.wait_s = wait_s


def count_call(api_key: ApiKey, ledger: Ledger) -> None:
    """Count one call of this minute. Raises `RateLimited`."""
    now = int(time.time())
    if ledger.quotas.count_call(api_key.name, now // MINUTE_S) > api_key.per_minute:
        raise RateLimited(f"This key may make {api_key.per_minute} calls a minute.", wait_s=MINUTE_S - now % MINUTE_S)


def reserve_job_id(api_key: ApiKey, idempotency_key: str, body: Mapping[str, Any], ledger: Ledger) -> str:
    """Return the id of the job that this request creates or has created. Raises `KeyReused`."""
    job_id = time.strftime("%Y%m%d-%H%M%S-api-", time.gmtime()) + secrets.token_hex(8)
    if not idempotency_key:
        return job_id
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    owner = hashlib.sha256(f"{api_key.name}\n{idempotency_key}".encode()).hexdigest()
    reserved_digest, reserved_id = ledger.quotas.reserve(owner, f"{digest} {job_id}").split(" ")
    if reserved_digest != digest:
        raise KeyReused("This Idempotency-Key came with another body before: use a new one.")
    return reserved_id


def submit(request: Request, job_id: str, *, store: Store, ledger: Ledger, lease_s: float) -> Job:
    """Create the job unless it exists. Raises what `check_request` raises, and `SettingsError` `source_empty`."""
    if existing := ledger.jobs.find(job_id):
        return existing
    check_request(request, ledger, store)
    head, _ = read_head(request, store)
    if len(head) > MAX_LIVE:
        backfill = dataclasses.replace(request, lane="backfill")
        ledger.jobs.create(draft_job(backfill, job_id=job_id, list_in_background=True, store=store))
    else:
        job = draft_job(request, job_id=job_id, rows=head, store=store)
        if not queue_live(job, head, ledger, lease_s=lease_s):
            _restore_record(ledger.jobs.get(job_id), store, ledger)
    return ledger.jobs.get(job_id)


def _restore_record(job: Job, store: Store, ledger: Ledger) -> None:
    """Write the rows that the ledger has into the record again. A concurrent call of the same request created the job
    first, perhaps from another listing than the one just recorded, and a rebuild reads the record."""
    if job.unrecorded == job.total:
        tasks = read_unrecorded(job, first=0, count=MAX_LIVE, ledger=ledger)
        write_record(job, store, rows=[S3Object(task.key, task.etag, task.size, hint=task.hint) for task in tasks])


def read_results(job: Job, *, first: int, limit: int, store: Store, ledger: Ledger) -> list[Result]:
    """Return up to `limit` images from index `first` on, fewer at the end of a manifest part."""
    if first >= job.total:
        return []
    tasks = ManifestReader(job, store, ledger).find(first, limit)
    states = ledger.images.states(job.id, first, len(tasks))
    with concurrent.futures.ThreadPoolExecutor(PARALLEL_LOOKUPS) as pool:
        return list(pool.map(lambda task, state: _result(job, task, state, store, ledger), tasks, states))


def _result(job: Job, task: ImageTask, state: ImageState, store: Store, ledger: Ledger) -> Result:
    result = Result(index=task.index, source=str(job.paths(task.key).source), state=state.name.lower())
    if state.has_outputs:
        return result.model_copy(update=_links(job, task.key, store))
    failure = ledger.images.failure(job.id, task.index) if state is ImageState.FAILED else None
    return result.model_copy(update={"code": failure.code, "message": failure.message}) if failure else result


def _links(job: Job, key: str, store: Store) -> dict[str, Any]:
    sign = functools.partial(store.presign, lasts_s=LINK_S)
    paths = job.paths(key)
    cutout = store.head(paths.cutout, role="output") if job.recipe.renditions else None
    # an image without a subject has no renditions; its cutout's metadata records it
    renditions = job.rendition_paths(key) if cutout and cutout.metadata.get("cf-renditions") else {}
    return {
        "cutout_url": sign(paths.cutout),
        "mask_url": sign(paths.mask),
        "renditions": {name: sign(location) for name, location in renditions.items()},
    }
