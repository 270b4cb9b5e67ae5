"""A job from a source: recorded in S3, then in the ledger, then fed. Killed at any line, it can be resumed or repeated.

A backfill is written as manifest parts, each in S3 before the ledger counts it; the dispatcher feeds what is counted
while listing goes on. A live job of up to `MAX_LIVE` images needs neither: one step puts it in the ledger and on its
queue.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from jobs.broker import lane_queue, render
from jobs.catalogue import PRESETS, RENDER
from jobs.errors import JobError, ServiceUnavailable, SettingsError
from jobs.job import Job
from jobs.ledger import MAX_LIVE, Ledger
from jobs.message import MAX_KEY_BYTES, ImageTask, Lane
from jobs.recipe import OWN_FOLDERS, Recipe
from jobs.s3.client import RECORDS, Location, S3Object, Store, destination_prefix
from producer.records.job_record import write_end, write_record
from producer.records.manifest import PART_ROWS, in_parts, keys_listed, last_listed, manifest_line, write_part
from producer.submission.skip_index import Known, look_up
from producer.submission.sources import EVERYTHING, Only, Report, list_prefix, named_keys, read_manifest, refuse_line

T = TypeVar("T")
NAMED_BY_HASH = re.compile(r"[A-Za-z0-9_.-]+@[0-9a-f]{12}")
"""What a worker calls a model that is no preset: `cutfleet workers` shows it."""

Waiting = Callable[[str], None] | None
"""Told once that Redis is full, and waits until there is room; None: it is an error."""
ROOM_S = 1.0
"""How often a full Redis is tried again."""
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_RECORD_BYTES = len(f"{RECORDS}/{'j' * 64}/review/{'d' * 64}.json")
"""Of the longest name that a job's own files have below its destination: a preview's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What a person asks for. `keys` and `manifest` None: everything under `source` that `only` takes.
    `bad_line` is told of a line of the manifest that makes no sense, by number and reason, and may raise. `weight`,
    `rate`, `sample`, `review_of`: see `Job`."""

    source: str
    destination: str
    recipe: Recipe
    lane: Lane
    name: str
    keys: tuple[str, ...] | None
    manifest: str | None = None
    only: Only = EVERYTHING
    bad_line: Report = refuse_line
    weight: int = 1
    rate: float | None = None
    sample: int | None = None
    webhook: str = ""
    webhook_images: bool = False
    review_of: str = ""


def submit(
    request: Request,
    *,
    store: Store,
    ledger: Ledger,
    lease_s: float,
    listed: Callable[[int], None],
    waiting: Waiting = None,
) -> Job:
    """Returns the job as the ledger has it after listing. `listed` is told how many images were found so far.

    Raises `SettingsError` for a source that is empty, a destination under its source, a model that is unknown; whatever
    the store raises when the source can't be listed or the destination not be written.
    """
    check_request(request, ledger, store)
    rows = rows_of(request, store)
    head = list(itertools.islice(rows, MAX_LIVE + 1))
    if not head:
        raise SettingsError(f"There are no images under {request.source}.", code="source_empty")
    job = _new_job(request, conditional=True)
    at_once = request.lane == "live" and request.rate is None and request.sample is None and len(head) <= MAX_LIVE
    job = dataclasses.replace(job, conditional=write_record(job, store, rows=head if at_once else ()))
    if at_once:
        lines = [live_row(index, row, job) for index, row in enumerate(head)]
        when_there_is_room(lambda: ledger.submit_live(job, lines, lease_s=lease_s), job, waiting, begun=False)
        listed(len(head))
    else:
        when_there_is_room(lambda: ledger.create_job(job), job, waiting, begun=False)
        lister = when_there_is_room(lambda: ledger.take_listing(job.id), job, waiting, begun=True)
        with look_up(job, store, ledger, at_least=len(head), whole=len(head) <= MAX_LIVE) as known:
            rows = itertools.chain(head, rows)
            _list(job, rows, store, ledger, known, lister=lister, first_part=0, listed=listed, waiting=waiting)
    return ledger.job(job.id)


def when_there_is_room(put: Callable[[], T], job: Job, waiting: Waiting, *, begun: bool) -> T:
    """Tries until Redis is not full, if somebody is `waiting`. Where it was, `put` changed nothing. `begun`: the ledger
    knows the job."""
    told = False
    while True:
        try:
            return put()
        except ServiceUnavailable as exc:
            if exc.code != "redis_full" or waiting is None:
                raise
            if not told:
                resume = f"it is taken up again by: cutfleet submit {job.source} --resume {job.id}"
                later = resume if begun else "nothing is submitted: submit it again."
                waiting(f"{exc} Job {job.id} waits for room. Interrupted, {later}")
            told = True
            time.sleep(ROOM_S)


def resume(
    job_id: str,
    request: Request,
    *,
    store: Store,
    ledger: Ledger,
    listed: Callable[[int], None],
    waiting: Waiting = None,
) -> Job:
    """Lists on from where a killed `submit` stopped; one that still runs ends by `job_busy`. Of `request` counts which
    images it asks for: raises `JobError` `other_source` when they are others than the job's, `job_cancelled`. Safe to
    repeat; nothing happens to a job that is listed."""
    job = ledger.job(job_id)
    if job.cancelled:
        raise JobError(f"Job {job_id} was cancelled: submit its source again.", code="job_cancelled")
    if job.listed:
        return job
    if job.watch:
        raise JobError(f"Job {job_id} is fed by `cutfleet watch`: there is nothing to resume.", code="job_watched")
    _check_asked(job, request)
    check_bounds(job.source, job.destination, store)
    lister = when_there_is_room(lambda: ledger.take_listing(job_id), job, waiting, begun=True)
    job = ledger.job(job_id)
    if job.total < job.parts * PART_ROWS:  # a part that is not full is the last of a listing
        return _end_listing(job, store, ledger)
    in_order = request.keys is not None or request.manifest is not None
    with contextlib.ExitStack() as stack:
        if in_order:
            rows = rows_of(request, store, after=last_listed(store, job))
        else:
            is_listed = stack.enter_context(keys_listed(store, job))
            rows = (row for row in rows_of(request, store) if not is_listed(row.key))
        known = stack.enter_context(look_up(job, store, ledger, at_least=1, whole=False))
        _list(job, rows, store, ledger, known, lister=lister, first_part=job.parts, listed=listed, waiting=waiting)
    return ledger.job(job_id)


def _check_asked(job: Job, request: Request) -> None:
    source, asked = str(Location.parse(request.source)), _asked(request)
    if source != job.source or (job.asked and asked != job.asked):
        raise JobError(
            f"Job {job.id} was submitted from {job.source} with {job.asked or 'everything'}, this is {source} with "
            f"{asked}: give the same source, keys, manifest and limits, or submit a job of its own.",
            code="other_source",
        )


def _asked(request: Request) -> str:
    """Which images of the source, in words that are the same only for the same ones. A manifest of this machine is
    known by its content, one in S3 by its name."""
    if request.keys is not None:
        return f"keys {hashlib.sha256(json.dumps(sorted(set(request.keys))).encode()).hexdigest()[:16]}"
    if request.manifest is None:
        limits = dataclasses.asdict(request.only).items()
        return ", ".join(f"{name} {value}" for name, value in limits if value) or "everything"
    if request.manifest.startswith("s3://"):
        return f"manifest {request.manifest}"
    if not Path(request.manifest).is_file():
        return "manifest"  # it is told of when it is read
    with Path(request.manifest).open("rb") as file:
        return f"manifest {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"


def check_request(request: Request, ledger: Ledger, store: Store) -> None:
    """Raises `SettingsError` for a destination under its source, places whose names are too long and a model that
    nobody knows, `SourceError` or `OutputError` for places that the store is not to touch."""
    check_places(request.source, request.destination, recipe=request.recipe, store=store)
    check_lengths(request.source, request.destination)
    check_bounds(request.source, request.destination, store)
    check_model(request.recipe.model, ledger)


def rows_of(request: Request, store: Store, *, after: str = "") -> Iterator[S3Object]:
    """The images asked for, each once, streamed. Named keys and manifests in the order of keys, those behind `after`
    only; a listing in no order, and whole."""
    source = Location.parse(request.source)
    if request.manifest is not None:
        return read_manifest(request.manifest, source, store, report=request.bad_line, after=after)
    if request.keys is not None:
        return named_keys(source, request.keys, store, after=after)
    return list_prefix(store, source, only=request.only)


def draft(request: Request, *, job_id: str, watch: str = "", rows: Sequence[S3Object] = (), store: Store) -> Job:
    """A live job whose record, with `rows` if they are known, is in S3; the ledger does not know it yet."""
    job = dataclasses.replace(_new_job(request, conditional=True), id=job_id, watch=watch)
    return dataclasses.replace(job, conditional=write_record(job, store, rows=rows))


def live_row(index: int, row: S3Object, job: Job) -> tuple[str, str, str]:
    """Queue, message and line of the manifest of one live image."""
    task = ImageTask(job.id, index, row.key, row.etag, row.size, job.lane, row.hint)
    return (*message_row(task, job), manifest_line(index, row))


def message_row(task: ImageTask, job: Job) -> tuple[str, str]:
    """Queue and message of one image."""
    source = Location(Location.parse(job.source).bucket, task.key)
    return lane_queue(job.lane, job.model), render(task, source_uri=str(source))


def check_places(source_uri: str, destination: str, *, recipe: Recipe, store: Store) -> None:
    """Raises `SettingsError` when a job by this recipe would read what it writes. Where sources have a store or an
    account of their own, a bucket of the same name may be another one: then only a destination under it is refused."""
    source, to = Location.parse(source_uri), destination_prefix(destination)
    written = [to.key] if to.key.startswith(source.key) else []
    if store.is_one:
        folders = (*OWN_FOLDERS, *map(recipe.rendition_folder, recipe.renditions))
        written += [to.key + folder for folder in folders if _meets(source.key, to.key, folder)]
    if source.bucket == to.bucket and written:
        raise SettingsError(
            f"Results would stand in {Location(to.bucket, written[0])}, and so under their own source {source}: the "
            "next run would cut them out again. Choose a destination elsewhere, or another source prefix.",
            code="destination_under_source",
        )


def _meets(source: str, to: str, folder: str) -> bool:
    """Whether results in `folder` may stand under `source`. A rendition without a folder may have any name below `to`,
    but has that of its source where this is relative to `to` as well."""
    below = source[: source.rfind("/") + 1]
    return (to + folder).startswith(source) or (below.startswith(to + folder) if folder else below == to)


def check_lengths(source: str, destination: str) -> None:
    """Raises `SettingsError` for a prefix that no object can have, or that leaves no room for a job's records."""
    check_length(Location.parse(source))
    check_length(destination_prefix(destination), below_bytes=_RECORD_BYTES)


def check_length(place: Location, *, below_bytes: int = 0) -> None:
    """Raises `SettingsError`. `below_bytes`: what names below it need."""
    size, most = len(place.key.encode(errors="surrogatepass")), MAX_KEY_BYTES - below_bytes
    if size > most:
        room = f", of which {below_bytes} are for what a job writes there" if below_bytes else ""
        raise SettingsError(
            f"What begins with {str(place)[:80]!r} has {size:,} bytes behind its bucket, and {most:,} is the most: S3 "
            f"holds names of {MAX_KEY_BYTES:,}{room}. Choose a shorter one.",
            code="name_too_long",
        )


def check_bounds(source: str, destination: str, store: Store) -> None:
    """Raises `SourceError` or `OutputError`. A source that is a prefix is so with all that begins with it."""
    store.check(Location.parse(source), "source")
    store.check(destination_prefix(destination), "output")


def check_model(model: str, ledger: Ledger) -> None:
    """A preset or `NAME@HASH` may be served later, by a fleet that is asleep; any other name is a slip."""
    served = {facts["model"] for facts in ledger.workers().values()}
    if model not in (*PRESETS, RENDER) and model not in served and not NAMED_BY_HASH.fullmatch(model):
        known = ", ".join([*PRESETS, *sorted(served - set(PRESETS))])
        raise SettingsError(f"No model is called {model!r}. Known: {known}.", code="model_unknown")


def _new_job(request: Request, *, conditional: bool) -> Job:
    now = time.time()
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now))
    return Job(
        id=f"{stamp}-{''.join(secrets.choice(_ALPHABET) for _ in range(6))}",
        name=request.name,
        source=str(Location.parse(request.source)),
        destination=str(destination_prefix(request.destination)),
        recipe=request.recipe.to_json(),
        model=request.recipe.model,
        lane=request.lane,
        webhook=request.webhook,
        webhook_images=request.webhook_images,
        review_of=request.review_of,
        conditional=conditional,
        created=now,
        weight=request.weight,
        rate=request.rate,
        sample=request.sample,
        asked=_asked(request),
    )


def _list(
    job: Job,
    rows: Iterable[S3Object],
    store: Store,
    ledger: Ledger,
    known: Known | None,
    *,
    lister: str,
    first_part: int,
    listed: Callable[[int], None],
    waiting: Waiting,
) -> None:
    found = first_part * PART_ROWS
    rows = (dataclasses.replace(row, hint=known.hint(row) if known else "") for row in rows)
    for part, batch in in_parts(rows, first_number=first_part):
        is_next = functools.partial(ledger.is_next_part, job.id, part.number, lister=lister)
        is_ours = write_part(store, job, part, batch, is_next=is_next)
        skipped = [row.hint == "known" for row in batch]
        made = known.fingerprint if known else ""
        first = part.number * PART_ROWS
        add = functools.partial(ledger.add_part, job.id, lister, part, first=first, known=skipped, made=made)
        if not is_ours or not when_there_is_room(add, job, waiting, begun=True):
            if ledger.job(job.id).cancelled:
                raise JobError(f"Job {job.id} was cancelled while it was being listed.", code="job_cancelled")
            raise JobError(f"Somebody else is listing job {job.id} now: leave it to them.", code="job_busy")
        found += part.count
        listed(found)
    _end_listing(job, store, ledger)


def _end_listing(job: Job, store: Store, ledger: Ledger) -> Job:
    write_end(job, ledger.job(job.id).total, store)
    ledger.finish_listing(job.id)
    return ledger.job(job.id)
