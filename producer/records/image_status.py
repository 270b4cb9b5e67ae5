"""Status of one source image, found in any job that covers it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from jobs.envelope import parse_message
from jobs.job import Job, JobKind
from jobs.ledger import Ledger
from jobs.message import BadMessage
from jobs.results import Failure
from jobs.s3.client import S3Object, Store
from jobs.s3.location import MAX_KEY_BYTES, Location
from jobs.s3.names import source_digest
from producer.records.failures import all_failures
from producer.records.manifest import read_part


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageStatus:
    """`state`: open, waiting, leased, retry, done, failed or unknown. `job` None: no job covers the image."""

    source: str
    state: str
    job: str | None = None
    cutout: str | None = None
    mask: str | None = None
    code: str | None = None
    message: str | None = None

    def summary(self) -> dict[str, Any]:
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def find_image_status(source: Location, *, ledger: Ledger, store: Store) -> ImageStatus:
    """Search the jobs whose source covers the key, newest first: the window in the ledger, then the cutout, then
    failures. A destination costs one request, whatever the size of its jobs, unless they are open or have failures."""
    in_window = _in_window(source, ledger)
    head = functools.cache(lambda location: store.head(location, role="output"))
    for job in ledger.jobs.all():
        if job.kind is JobKind.PREVIEW or job.source.bucket != source.bucket:
            continue
        if source.key.startswith(job.source.key):
            status = _status_in(job, source, in_window.get(job.id), ledger, store, head)
            if status is not None:
                return status
    return ImageStatus(source=str(source), state="unknown")


def _in_window(source: Location, ledger: Ledger) -> dict[str, str]:
    """Return by job the image in the window that has this key."""
    entries = ledger.window.entries()
    return {image.rpartition(":")[0]: image for image, message in entries if _key_of(message) == source.key}


def _key_of(message: str) -> str:
    """Return the key in a message; empty if it is unreadable: a worker will fail its image."""
    try:
        return parse_message(message).key
    except BadMessage:
        return ""


def _status_in(
    job: Job,
    source: Location,
    image: str | None,
    ledger: Ledger,
    store: Store,
    head: Callable[[Location], S3Object | None],
) -> ImageStatus | None:
    status = functools.partial(ImageStatus, source=str(source), job=job.id)
    if image is not None:
        return status(state=str(ledger.window.place(image) or "open"))
    paths = job.paths(source.key)
    made_by = _made_by(paths.cutout, source, head)
    if made_by != job.id and (failure := _failure(job, source.key, ledger, store)):
        return status(state="failed", code=failure.code, message=failure.message)
    if made_by:
        return status(state="done", cutout=str(paths.cutout), mask=str(paths.mask))
    if job.closed is None and _is_listed(job, source.key, ledger, store):
        return status(state="open")
    return None


def _made_by(cutout: Location, source: Location, head: Callable[[Location], S3Object | None]) -> str:
    """Return the id of the job that made the cutout; empty when there is none of this source."""
    output = head(cutout) if cutout.key_bytes <= MAX_KEY_BYTES else None
    if output is None or output.metadata.get("cf-source") != source_digest(source):
        return ""
    return output.metadata.get("cf-job", "")


def _failure(job: Job, key: str, ledger: Ledger, store: Store) -> Failure | None:
    if not job.failed:
        return None
    failures = all_failures(job, ledger=ledger, store=store)
    return next((failure for _, failure in failures if failure.key == key), None)


def _is_listed(job: Job, key: str, ledger: Ledger, store: Store) -> bool:
    parts = [part.number for part in ledger.jobs.parts(job.id) if part.first <= key <= part.last]
    return any(task.key == key for number in parts for task in read_part(store, job, number))
