"""What the HTTP API asks of ledger and store. A request of at most `MAX_LIVE` images is a job that is on its queue
before it is answered; a larger prefix is a backfill that `producer/api/background_listing.py` lists.

`Idempotency-Key` reserves a job's id first, for a day: killed at any line, the same request makes the same job.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import secrets
import time
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel

from jobs.errors import CutfleetError, JobError, SettingsError
from jobs.job import ImageState, Job
from jobs.ledger import MAX_LIVE, Ledger
from jobs.message import ImageTask
from jobs.recipe import Recipe
from jobs.s3.client import Location, S3Object, Store, image_names, rendition_names
from producer.api.auth import Caller
from producer.records.job_record import write_record
from producer.records.manifest import find_rows, read_part, read_unrecorded
from producer.submission.submit import Request, check_request, draft, live_row, rows_of

LINK_S = 3600
LOOKS_AT_ONCE = 8
MINUTE_S = 60
_DONE = (ImageState.DONE, ImageState.REVIEW, ImageState.SKIPPED)


class Result(BaseModel):
    """One image. `cutout_url`, `mask_url`, `renditions` (by name): links that anybody may fetch for an hour."""

    index: int
    source: str
    state: Literal["open", "done", "failed", "skipped", "cancelled", "review"]
    cutout_url: str | None = None
    mask_url: str | None = None
    renditions: dict[str, str] | None = None
    code: str | None = None
    message: str | None = None


class Conflict(CutfleetError):
    """What is asked for does not go with what was asked before."""

    code = "idempotency_key_reused"


class TooMany(CutfleetError):
    """The caller has used up its minute; `wait_s` until the next."""

    code = "rate_limited"

    def __init__(self, message: str, *, wait_s: int) -> None:
        super().__init__(message)
        self.wait_s = wait_s


def spend(caller: Caller, ledger: Ledger) -> None:
    """Counts one request of this minute. Raises `TooMany`."""
    now = time.time()
    if ledger.count_call(caller.name, int(now) // MINUTE_S) > caller.per_minute:
        wait_s = MINUTE_S - int(now) % MINUTE_S
        raise TooMany(f"This key may ask {caller.per_minute} times a minute.", wait_s=wait_s)


def reserve(caller: Caller, key: str, body: Mapping[str, Any], ledger: Ledger) -> str:
    """The id of the job that this request makes or has made. Raises `Conflict` when the key came with another body."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    job_id = f"{stamp}-api-{secrets.token_hex(8)}"
    if not key:
        return job_id
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    owner = hashlib.sha256(f"{caller.name}\n{key}".encode()).hexdigest()
    kept, found = ledger.reserve(owner, f"{digest} {job_id}").split(" ")
    if kept != digest:
        raise Conflict("This Idempotency-Key came with another body before: take a new one.")
    return found


def submit(request: Request, job_id: str, *, store: Store, ledger: Ledger, lease_s: float) -> Job:
    """Makes the job unless it is there. Raises `SettingsError` for a source that is empty."""
    found = ledger.find_job(job_id)
    if found is not None:
        return found
    check_request(request, ledger, store)
    head = list(itertools.islice(rows_of(request, store), MAX_LIVE + 1))
    if not head:
        raise SettingsError(f"There are no images under {request.source}.", code="source_empty")
    if len(head) > MAX_LIVE:
        backfill = draft(dataclasses.replace(request, lane="backfill"), job_id=job_id, store=store)
        ledger.create_job(dataclasses.replace(backfill, to_be_listed=True))
    else:
        job = draft(request, job_id=job_id, rows=head, store=store)
        rows = [live_row(index, row, job) for index, row in enumerate(head)]
        if not ledger.submit_live(job, rows, lease_s=lease_s):
            _restore_record(ledger.job(job_id), store, ledger)
    return ledger.job(job_id)


def _restore_record(job: Job, store: Store, ledger: Ledger) -> None:
    """The same request, sent twice at once, made the job first, perhaps of another listing than what is recorded now:
    Redis lost, the job would be rebuilt of that."""
    if job.unrecorded == job.total:
        found = read_unrecorded(job, first=0, count=MAX_LIVE, ledger=ledger)
        write_record(job, store, rows=[S3Object(task.key, task.etag, task.size, hint=task.hint) for task in found])


def cancel(job: Job, ledger: Ledger) -> None:
    """Raises `JobError` when it is closed."""
    if not ledger.cancel(job.id):
        raise JobError(f"Request {job.id} is completed: there is nothing to cancel.", code="job_closed")


def results(job: Job, *, first: int, limit: int, store: Store, ledger: Ledger) -> list[Result]:
    """Up to `limit` images from index `first` on, fewer at the end of a part: go on behind the last."""
    if first >= job.total:
        return []
    tasks = find_rows(job, first, limit, part=lambda number: read_part(store, job, number), ledger=ledger)
    states = ledger.states(job.id, first, len(tasks))
    links = _Links(job, store)
    with concurrent.futures.ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
        return list(pool.map(lambda task, state: _result(job, task, state, links, ledger), tasks, states))


def _result(job: Job, task: ImageTask, state: ImageState, links: _Links, ledger: Ledger) -> Result:
    source = image_names(job.source, job.destination, task.key).source
    found = Result(index=task.index, source=str(source), state=state.name.lower())
    if state in _DONE:
        return found.model_copy(update=links.of(task.key))
    failure = ledger.failure(job.id, task.index) if state is ImageState.FAILED else None
    return found.model_copy(update={"code": failure.code, "message": failure.message}) if failure else found


class _Links:
    """To what was made of a job's images."""

    def __init__(self, job: Job, store: Store) -> None:
        self._job = job
        self._store = store
        self._recipe = Recipe.from_json(job.recipe)

    def of(self, key: str) -> dict[str, Any]:
        names = image_names(self._job.source, self._job.destination, key)
        return {
            "cutout_url": self._sign(names.cutout),
            "mask_url": self._sign(names.mask),
            "renditions": {name: self._sign(place) for name, place in self._renditions(key, names.cutout).items()},
        }

    def _renditions(self, key: str, cutout: Location) -> dict[str, Location]:
        """Of an image without a subject there are none: its cutout says so."""
        if not self._recipe.renditions:
            return {}
        found = self._store.head(cutout, role="output")
        if found is None or not found.metadata.get("cf-renditions"):
            return {}
        return rendition_names(self._recipe, self._job.source, self._job.destination, key)

    def _sign(self, place: Location) -> str:
        return self._store.presign(place, lasts_s=LINK_S)
