"""`cutfleet review`: selects images of a job that a person should check, has their previews made, and writes the page.

Workers on a CPU make the previews, as a job of its own that writes beside the records of the reviewed job
(`jobs/preview.py`). `producer/review/page.py` writes the page.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jobs.errors import ImageError, JobError
from jobs.job import ImageState, Job, JobKind
from jobs.ledger import Ledger
from jobs.message import RENDER_POOL, ImageTask
from jobs.preview import Preview
from jobs.results import Failure
from jobs.s3.client import Store
from producer.console.progress import progress, wait_until_closed
from producer.records.failures import all_failures
from producer.records.manifest import PART_ROWS, ManifestReader
from producer.review.page import Row, write_page
from producer.submission.request import Request
from producer.submission.submit import submit

MAX_IMAGES = 5_000
"""Images of one page: some 600 MB, which a browser opens in seconds. A random sample is drawn of more."""
MAX_PREVIEW_BYTES = 4_000_000
"""Far above the size of a preview."""
CONNECTIONS = 16
_CRASH_CODES = {"crashed_decoder", "crashed_device", "crashed_worker", "memory_exhausted", "stalled", "killed"}
"""Codes of images that crashed workers: no preview is made of them."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """`sample`: how many more images, drawn at random of all that have a cutout; the same ones for each review."""

    flagged: bool
    failed: bool
    sample: int = 0


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An image for the page. `failure`: why it failed; None if it did not."""

    task: ImageTask
    failure: Failure | None

    @property
    def has_preview(self) -> bool:
        return self.failure is None or self.failure.code not in _CRASH_CODES


def write_review(
    job: Job,
    selection: Selection,
    folder: Path,
    *,
    store: Store,
    ledger: Ledger,
    lease_s: float,
    on_submitted: Callable[[Job], None],
) -> Path:
    """Return the path of the page once all previews are made. `on_submitted`: called with the job that makes them.
    Raises `JobError` `nothing_to_review`."""
    candidates, available = _select(job, selection, store=store, ledger=ledger)
    if not candidates:
        raise JobError(
            f"Job {job.id} has no image of this selection. `--sample N` takes a random sample of all cutouts.",
            code="nothing_to_review",
        )
    previews = _submit_previews(job, candidates, store=store, ledger=ledger, lease_s=lease_s)
    if previews is not None:
        on_submitted(previews)
        try:
            wait_until_closed(previews.id, ledger, timeout_s=None)
        except BaseException:  # Ctrl-C, for example
            ledger.jobs.cancel(previews.id)
            raise
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / f"review-{job.id}.html"
    with progress("images on the page") as update:
        rows = _read_rows(job, candidates, previews, store=store, ledger=ledger)
        write_page(job, _counted(rows, update), page, available=available)
    return page


def _select(job: Job, selection: Selection, *, store: Store, ledger: Ledger) -> tuple[list[Candidate], int]:
    """Return at most `MAX_IMAGES` candidates in order of index, and how many there are."""
    indexes = _select_indexes(job, selection, ledger)
    rng = _rng(job)
    failures = _sample_failures(job, rng, store=store, ledger=ledger) if selection.failed else {}
    available = len(indexes) + (job.failed if selection.failed else 0)
    chosen = sorted(indexes | failures.keys())
    if len(chosen) > MAX_IMAGES:
        chosen = sorted(rng.sample(chosen, MAX_IMAGES))
    manifest = ManifestReader(job, store, ledger)
    # A watch lists a key again for each of its versions: the last one counts.
    tasks = {task.key: task for index in chosen for task in manifest.find(index)}
    return [Candidate(task, failures.get(task.index)) for task in tasks.values()], available


def _select_indexes(job: Job, selection: Selection, ledger: Ledger) -> set[int]:
    """Return the flagged images (in review, or with an unmet rule) and the random sample."""
    flagged = set(ledger.images.notes(job.id)) if selection.flagged else set()
    drawn: list[tuple[float, int]] = []
    rng = _rng(job)
    for first in range(0, job.total, PART_ROWS):
        states = ledger.images.states(job.id, first, min(PART_ROWS, job.total - first))
        for index, state in enumerate(states, first):
            if selection.flagged and state is ImageState.REVIEW:
                flagged.add(index)
            if selection.sample and state.has_outputs:
                drawn.append((rng.random(), index))
        drawn = heapq.nsmallest(selection.sample, drawn)
    return flagged | {index for _, index in drawn}


def _sample_failures(job: Job, rng: random.Random, *, store: Store, ledger: Ledger) -> dict[int, Failure]:
    """Return at most `MAX_IMAGES` failures by index, drawn at random."""
    drawn = ((rng.random(), index, failure) for index, failure in all_failures(job, ledger=ledger, store=store))
    return {index: failure for _, index, failure in heapq.nsmallest(MAX_IMAGES, drawn, key=lambda row: row[0])}


def _submit_previews(
    job: Job, candidates: Iterable[Candidate], *, store: Store, ledger: Ledger, lease_s: float
) -> Job | None:
    """Return the job that makes the previews; None when no candidate gets one."""
    tasks = [candidate.task for candidate in candidates if candidate.has_preview]
    if not tasks:
        return None
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", prefix="cutfleet-") as manifest:
        for task in tasks:
            manifest.write(json.dumps({"key": task.key, "etag": task.etag, "size": task.size}) + "\n")
        manifest.flush()
        request = Request(
            source=job.source,
            destination=job.destination,
            recipe=dataclasses.replace(job.recipe, model=RENDER_POOL),
            lane="backfill",
            name=f"review {job.name}",
            keys=None,
            manifest=manifest.name,
            kind=JobKind.PREVIEW,
            review_of=job.id,
        )
        return submit(request, store=store, ledger=ledger, lease_s=lease_s, listed=lambda _: None)


def _read_rows(
    job: Job, candidates: list[Candidate], previews: Job | None, *, store: Store, ledger: Ledger
) -> Iterator[Row]:
    """Yield the rows of the page in the order of `candidates`; few are in memory at a time. `previews`: the job that
    made them."""
    failures = all_failures(previews, ledger=ledger, store=store) if previews else ()
    failed_previews = {failure.key: failure for _, failure in failures}

    def read(candidate: Candidate) -> Row:
        key = candidate.task.key
        return Row(key, candidate.failure, _read_preview(candidate, failed_previews.get(key), job, store))

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for start in range(0, len(candidates), CONNECTIONS):
            yield from pool.map(read, candidates[start : start + CONNECTIONS])


def _read_preview(candidate: Candidate, failure: Failure | None, job: Job, store: Store) -> Preview:
    """`failure`: why the preview was not made."""
    if failure is not None:
        return Preview(notes=(f"preview: {failure.message} [{failure.code}]",))
    if not candidate.has_preview:
        return Preview(notes=("preview: none is made of an image that crashed workers.",))
    try:
        body, _ = store.get(job.preview_path(candidate.task.key), role="output", max_bytes=MAX_PREVIEW_BYTES)
    except ImageError as exc:
        return Preview(notes=(f"preview: {exc} [{exc.code}]",))
    return Preview.from_json(body)


def _counted(rows: Iterable[Row], update: Callable[[int], None]) -> Iterator[Row]:
    for count, row in enumerate(rows, 1):
        update(count)
        yield row


def _rng(job: Job) -> random.Random:
    return random.Random(job.id)  # noqa: S311  (samples images, protects no secret)
