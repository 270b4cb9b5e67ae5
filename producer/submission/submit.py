"""Submits a job: record it in S3, then in the ledger; the dispatcher feeds it. Killed at any line, a submission can be
resumed or repeated.

A backfill is listed into manifest parts. Each part is in S3 before the ledger counts it, and the dispatcher feeds
counted parts while listing continues. A live job of up to `MAX_LIVE` images needs no parts: one step puts it in the
ledger and on its queue."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from jobs.errors import JobError, RedisFull, SettingsError
from jobs.job import Job, JobKind
from jobs.ledger import Ledger
from jobs.ledger.jobs import MAX_LIVE
from jobs.message import RENDER_POOL
from jobs.s3.client import S3Object, Store
from producer.records.job_record import write_end, write_record
from producer.records.manifest import PART_ROWS, in_parts, last_listed_key, listed_keys, live_row, write_part
from producer.submission.request import Request
from producer.submission.skip_index import SkipIndex, build_skip_index
from producer.submission.sources import read_rows
from producer.submission.validation import check_allowed, check_request

T = TypeVar("T")

WaitNotice = Callable[[str], None] | None
"""Called once when Redis is full; the submission then waits. None: a full Redis is an error."""
RETRY_FULL_S = 1.0
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"


def submit(
    request: Request,
    *,
    store: Store,
    ledger: Ledger,
    lease_s: float,
    listed: Callable[[int], None],
    waiting: WaitNotice = None,
) -> Job:
    """Submit a job and list it to the end; return it as the ledger has it. `listed`: called with the number of images
    so far. Raises what `check_request` raises, `SettingsError` `source_empty`, and what the store raises."""
    check_request(request, ledger, store)
    head, rows = read_head(request, store)
    is_unlimited = request.rate is None and request.sample is None
    is_live = request.lane == "live" and is_unlimited and len(head) <= MAX_LIVE
    job = draft_job(request, rows=head if is_live else (), store=store)
    retry = functools.partial(_retry_while_full, job=job, waiting=waiting)
    if is_live:
        retry(lambda: queue_live(job, head, ledger, lease_s=lease_s), begun=False)
        listed(len(head))
        return ledger.jobs.get(job.id)
    retry(lambda: ledger.jobs.create(job), begun=False)
    lister = retry(lambda: ledger.jobs.take_listing(job.id), begun=True)
    with build_skip_index(job, store, ledger, at_least=len(head), is_whole=len(head) <= MAX_LIVE) as index:
        listing = _Listing(job, lister, store, ledger, index, listed, waiting)
        return listing.add(itertools.chain(head, rows), first_part=0)


def resume(
    job_id: str,
    request: Request,
    *,
    store: Store,
    ledger: Ledger,
    listed: Callable[[int], None],
    waiting: WaitNotice = None,
) -> Job:
    """Continue the listing of a killed `submit`; one that still runs fails with `job_busy`. Safe to repeat; does
    nothing to a job that is listed. Of `request` only the selection counts. Raises `JobError`: `other_source` when the
    selection is not the job's, `job_cancelled`, `job_watched`."""
    job = ledger.jobs.get(job_id)
    if job.cancelled:
        raise JobError(f"Job {job_id} was cancelled: submit its source again.", code="job_cancelled")
    if job.listed:
        return job
    if job.watch:
        raise JobError(f"Job {job_id} is fed by `cutfleet watch`: there is nothing to resume.", code="job_watched")
    _check_selection(job, request)
    check_allowed(job.source, job.destination, store)
    take_listing = functools.partial(ledger.jobs.take_listing, job_id)
    lister = _retry_while_full(take_listing, job=job, waiting=waiting, begun=True)
    job = ledger.jobs.get(job_id)
    if job.total < job.parts * PART_ROWS:  # a part that is not full is the last of a listing
        return _end_listing(job, store, ledger)
    with (
        _unlisted_rows(job, request, store) as rows,
        build_skip_index(job, store, ledger, at_least=1, is_whole=False) as index,
    ):
        listing = _Listing(job, lister, store, ledger, index, listed, waiting)
        return listing.add(rows, first_part=job.parts)


def read_head(request: Request, store: Store) -> tuple[list[S3Object], Iterator[S3Object]]:
    """Return the first `MAX_LIVE` + 1 images, and a stream of the others. Raises `SettingsError` `source_empty`."""
    rows = read_rows(request, store)
    head = list(itertools.islice(rows, MAX_LIVE + 1))
    if not head:
        raise SettingsError(f"There are no images under {request.source}.", code="source_empty")
    return head, rows


def draft_job(
    request: Request,
    *,
    job_id: str = "",
    watch: str = "",
    list_in_background: bool = False,
    rows: Sequence[S3Object] = (),
    store: Store,
) -> Job:
    """Write a new job's record, with the `rows` of a live job, to S3; return the job, which the ledger does not know
    yet."""
    now = time.time()
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now))
    job = Job(
        id=job_id or f"{stamp}-{''.join(secrets.choice(_ALPHABET) for _ in range(6))}",
        name=request.name,
        source=request.source,
        destination=request.destination,
        recipe_json=request.recipe.to_json(),
        model=request.recipe.model if request.kind is JobKind.CUT else RENDER_POOL,
        lane=request.lane,
        kind=request.kind,
        webhook=request.webhook,
        webhook_images=request.webhook_images,
        review_of=request.review_of,
        conditional=True,
        created=now,
        weight=request.weight,
        rate=request.rate,
        sample=request.sample,
        watch=watch,
        list_in_background=list_in_background,
        selection=request.describe_selection(),
    )
    return dataclasses.replace(job, conditional=write_record(job, store, rows=rows))


def queue_live(job: Job, rows: Sequence[S3Object], ledger: Ledger, *, lease_s: float) -> bool:
    """Create a live job with all its images queued. Return False when the job exists."""
    return ledger.jobs.create_live(job, [live_row(i, row, job) for i, row in enumerate(rows)], lease_s=lease_s)


@dataclasses.dataclass(frozen=True)
class _Listing:
    """Writes rows as parts of the manifest, and counts each in the ledger. `lister`: token of `take_listing`."""

    job: Job
    lister: str
    store: Store
    ledger: Ledger
    index: SkipIndex | None
    listed: Callable[[int], None]
    waiting: WaitNotice

    def add(self, rows: Iterable[S3Object], *, first_part: int) -> Job:
        """Raises `JobError`: `job_cancelled`, or `job_busy` when another process lists the job now."""
        jobs, job_id = self.ledger.jobs, self.job.id
        rows = (dataclasses.replace(row, hint=self.index.hint(row) if self.index else "") for row in rows)
        fingerprint = self.index.fingerprint if self.index else ""
        count = first_part * PART_ROWS
        for part, batch in in_parts(rows, first_number=first_part):
            is_next = functools.partial(jobs.is_next_part, job_id, part.number, lister=self.lister)
            is_ours = write_part(self.store, self.job, part, batch, is_next=is_next)
            skipped = [row.hint == "known" for row in batch]
            first = part.number * PART_ROWS
            add_part = functools.partial(
                jobs.add_part, job_id, self.lister, part, first=first, skipped=skipped, fingerprint=fingerprint
            )
            if not is_ours or not _retry_while_full(add_part, job=self.job, waiting=self.waiting, begun=True):
                raise self._interrupted()
            count += part.count
            self.listed(count)
        return _end_listing(self.job, self.store, self.ledger)

    def _interrupted(self) -> JobError:
        if self.ledger.jobs.get(self.job.id).cancelled:
            return JobError(f"Job {self.job.id} was cancelled while it was being listed.", code="job_cancelled")
        return JobError(f"Another process is listing job {self.job.id} now.", code="job_busy")


@contextlib.contextmanager
def _unlisted_rows(job: Job, request: Request, store: Store) -> Iterator[Iterator[S3Object]]:
    """Yield the images that no part of the manifest has."""
    if request.is_ordered:
        yield read_rows(request, store, after=last_listed_key(store, job))
        return
    with listed_keys(store, job) as is_listed:
        yield (row for row in read_rows(request, store) if not is_listed(row.key))


def _check_selection(job: Job, request: Request) -> None:
    selection = request.describe_selection()
    if request.source != job.source or (job.selection and selection != job.selection):
        raise JobError(
            f"Job {job.id} was submitted from {job.source} with {job.selection or 'everything'}, this is "
            f"{request.source} with {selection}: give the same source, keys, manifest and limits, or submit a new job.",
            code="other_source",
        )


def _retry_while_full(put: Callable[[], T], *, job: Job, waiting: WaitNotice, begun: bool) -> T:
    """Call `put` until Redis has room, if `waiting` is given. `begun`: the ledger knows the job."""
    is_noticed = False
    while True:
        try:
            return put()
        except RedisFull as exc:  # `put` changed nothing
            if waiting is None:
                raise
            if not is_noticed:
                resume = f"continue with: cutfleet submit {job.source} --resume {job.id}"
                after = resume if begun else "nothing is submitted: submit it again."
                waiting(f"{exc} Job {job.id} waits for room. If interrupted, {after}")
            is_noticed = True
            time.sleep(RETRY_FULL_S)


def _end_listing(job: Job, store: Store, ledger: Ledger) -> Job:
    write_end(job, ledger.jobs.get(job.id).total, store)
    ledger.jobs.finish_listing(job.id)
    return ledger.jobs.get(job.id)
