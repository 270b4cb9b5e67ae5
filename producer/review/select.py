"""`cutfleet review`: the images of a job that a person should look at, on one page that needs nothing but a browser.

Their previews are made by workers on a CPU, as a job of its own that writes beside the reviewed one's records
(`jobs/preview.py`); the page is put together here (`producer/review/page.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import heapq
import json
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jobs.catalogue import RENDER
from jobs.errors import ImageError, JobError
from jobs.job import Failure, ImageState, Job
from jobs.ledger import Ledger
from jobs.message import ImageTask
from jobs.preview import Preview
from jobs.recipe import Recipe
from jobs.s3.client import Store, image_names, preview_location
from producer.console.output import Counter, wait_for
from producer.records.failures import failures_of
from producer.records.manifest import PART_ROWS, find_rows, read_part
from producer.review.page import Row, write_page
from producer.submission.submit import Request, submit

MOST = 5_000
"""Images on one page: some 600 MB, which a browser opens in seconds. Of more, as many are drawn at random."""
MAX_BYTES = 4_000_000
"""Far above what a preview takes."""
CONNECTIONS = 16
_HAVE_CUTOUT = (ImageState.DONE, ImageState.REVIEW, ImageState.SKIPPED)
_DANGEROUS = {"crashed_decoder", "crashed_device", "crashed_worker", "memory_exhausted", "stalled", "killed"}
"""What brought workers down is not given to them again for the sake of a preview."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """`sample`: how many more, drawn at random of all that have a cutout; the same ones each time."""

    flagged: bool
    failed: bool
    sample: int = 0


@dataclasses.dataclass(frozen=True)
class Choice:
    """`failure`: why it failed; None where it did not."""

    task: ImageTask
    failure: Failure | None


def write_review(
    job: Job,
    wanted: Wanted,
    folder: Path,
    *,
    store: Store,
    ledger: Ledger,
    lease_s: float,
    asked: Callable[[Job], None],
) -> Path:
    """Returns the page's path when all its previews are made. `asked` is told of the job that makes them. Raises
    `JobError` `nothing_to_review`."""
    choices, of = _choose(job, wanted, store=store, ledger=ledger)
    if not choices:
        raise JobError(
            f"There is nothing to review in job {job.id}: no image of it is like that. `--sample N` draws some of "
            "all that are done.",
            code="nothing_to_review",
        )
    made = _ask_for_previews(job, choices, store=store, ledger=ledger, lease_s=lease_s)
    if made is not None:
        asked(made)
        with _cancelled_if_left(made, ledger):
            wait_for(made.id, ledger, timeout_s=None)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / f"review-{job.id}.html"
    with Counter("images on the page") as counter:
        rows = _fetch_rows(job, choices, made, store=store, ledger=ledger)
        write_page(job, _counted(rows, counter), page, of=of)
    return page


def _choose(job: Job, wanted: Wanted, *, store: Store, ledger: Ledger) -> tuple[list[Choice], int]:
    """At most `MOST`, in order of index; and how many there were."""
    found = _wanted_indexes(job, wanted, ledger)
    dice = _dice(job)
    failures: list[tuple[float, int, Failure]] = []
    if wanted.failed:
        lots = ((dice.random(), index, failure) for index, failure in failures_of(job, ledger=ledger, store=store))
        failures = heapq.nsmallest(MOST, lots, key=lambda lot: lot[0])
    failed = {index: failure for _, index, failure in failures}
    of = len(found) + (job.failed if wanted.failed else 0)
    indexes = sorted(found | failed.keys())
    if len(indexes) > MOST:
        indexes = sorted(dice.sample(indexes, MOST))
    # A watch lists a key again for each of its versions: the last one counts.
    tasks = {task.key: task for task in _tasks(job, indexes, store=store, ledger=ledger)}
    return [Choice(task, failed.get(task.index)) for task in tasks.values()], of


def _ask_for_previews(
    job: Job, choices: Iterable[Choice], *, store: Store, ledger: Ledger, lease_s: float
) -> Job | None:
    """The job that makes them; None where there is nothing that may be shown."""
    tasks = [choice.task for choice in choices if _may_be_decoded(choice)]
    if not tasks:
        return None
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", prefix="cutfleet-") as manifest:
        for task in tasks:
            manifest.write(json.dumps({"key": task.key, "etag": task.etag, "size": task.size}) + "\n")
        manifest.flush()
        request = Request(
            source=job.source,
            destination=job.destination,
            recipe=dataclasses.replace(Recipe.from_json(job.recipe), model=RENDER),
            lane="backfill",
            name=f"review {job.name}",
            keys=None,
            manifest=manifest.name,
            review_of=job.id,
        )
        return submit(request, store=store, ledger=ledger, lease_s=lease_s, listed=lambda _: None)


def _fetch_rows(job: Job, choices: list[Choice], made: Job | None, *, store: Store, ledger: Ledger) -> Iterator[Row]:
    """`made`: the job that made the previews. In the order of `choices`; few are in memory at a time."""
    lost = {failure.key: failure for _, failure in failures_of(made, ledger=ledger, store=store)} if made else {}

    def fetch(choice: Choice) -> Row:
        return Row(choice.task.key, choice.failure, _preview_of(choice, lost.get(choice.task.key), job, store))

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for start in range(0, len(choices), CONNECTIONS):
            yield from pool.map(fetch, choices[start : start + CONNECTIONS])


def _preview_of(choice: Choice, lost: Failure | None, job: Job, store: Store) -> Preview:
    if lost is not None:
        return Preview(notes=(f"preview: {lost.message} [{lost.code}]",))
    if not _may_be_decoded(choice):
        return Preview(notes=("preview: none is made of what brought workers down.",))
    source = image_names(job.source, job.destination, choice.task.key).source
    try:
        body, _ = store.get(preview_location(job.destination, job.id, source), role="output", max_bytes=MAX_BYTES)
    except ImageError as exc:
        return Preview(notes=(f"preview: {exc} [{exc.code}]",))
    return Preview.from_json(body)


def _may_be_decoded(choice: Choice) -> bool:
    return choice.failure is None or choice.failure.code not in _DANGEROUS


def _counted(rows: Iterable[Row], counter: Counter) -> Iterator[Row]:
    for count, row in enumerate(rows, 1):
        counter.update(count)
        yield row


@contextlib.contextmanager
def _cancelled_if_left(job: Job, ledger: Ledger) -> Iterator[None]:
    """Whoever stops waiting (Ctrl-C) does not want the previews any more."""
    try:
        yield
    except BaseException:
        ledger.cancel(job.id)
        raise


def _dice(job: Job) -> random.Random:
    return random.Random(job.id)  # noqa: S311  (draws images, keeps no secret)


def _wanted_indexes(job: Job, wanted: Wanted, ledger: Ledger) -> set[int]:
    """Flagged are those in review, and those whose renditions did not pass all of their rules."""
    flagged = set(ledger.remarks(job.id)) if wanted.flagged else set()
    lots: list[tuple[float, int]] = []
    dice = _dice(job)
    for first in range(0, job.total, PART_ROWS):
        for index, state in enumerate(ledger.states(job.id, first, min(PART_ROWS, job.total - first)), first):
            if wanted.flagged and state is ImageState.REVIEW:
                flagged.add(index)
            if wanted.sample and state in _HAVE_CUTOUT:
                lots.append((dice.random(), index))
        lots = heapq.nsmallest(wanted.sample, lots)
    return flagged | {index for _, index in lots}


def _tasks(job: Job, indexes: list[int], *, store: Store, ledger: Ledger) -> Iterator[ImageTask]:
    """One part of the manifest in memory at a time."""
    part = functools.lru_cache(maxsize=1)(lambda number: read_part(store, job, number))
    for index in indexes:
        yield from find_rows(job, index, 1, part=part, ledger=ledger)
