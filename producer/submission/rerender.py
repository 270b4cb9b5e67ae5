"""Asks for renditions of a job's cutouts by another recipe: a job of its own, whose images need no model."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from jobs.catalogue import RENDER
from jobs.errors import JobError
from jobs.job import ImageState, Job
from jobs.ledger import Ledger
from jobs.message import ImageTask, Lane
from jobs.recipe import Recipe
from jobs.s3.client import Store
from producer.records.manifest import PART_ROWS, read_part, read_unrecorded
from producer.submission.submit import Request, submit

_MAX_UNRECORDED = 10 * PART_ROWS
"""Far more than the dispatcher leaves unrecorded."""
_HAVE_CUTOUT = (ImageState.DONE, ImageState.REVIEW, ImageState.SKIPPED)


def render(
    job: Job, recipe: Recipe, *, lane: Lane, store: Store, ledger: Ledger, lease_s: float, listed: Callable[[int], None]
) -> Job:
    """The new job, of the images of `job` that have a cutout by now. Of `recipe` counts what needs only that:
    renditions, their names and rules, delivery, review. Raises `JobError` `nothing_to_render`, and what `submit` does.
    """
    made_by = Recipe.from_json(job.recipe)
    merged = dataclasses.replace(
        recipe,
        model=RENDER,
        edges=made_by.edges,
        alpha=made_by.alpha,
        animation=made_by.animation,
        keep_credit=made_by.keep_credit,
    )
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", prefix="cutfleet-") as manifest:
        count = _write_keys(job, Path(manifest.name), store, ledger)
        if not count:
            raise JobError(
                f"Job {job.id} has no cutouts to render from" + ("." if job.closed else " yet."),
                code="nothing_to_render",
            )
        request = Request(
            source=job.source,
            destination=job.destination,
            recipe=merged,
            lane=lane,
            name=f"render {job.name}",
            keys=None,
            manifest=manifest.name,
        )
        return submit(request, store=store, ledger=ledger, lease_s=lease_s, listed=listed)


def _write_keys(job: Job, to: Path, store: Store, ledger: Ledger) -> int:
    count = 0
    with to.open("w", encoding="utf-8") as lines:
        for tasks in _tasks(job, store, ledger):
            states = ledger.states(job.id, tasks[0].index, len(tasks))
            for task, state in zip(tasks, states, strict=True):
                if state in _HAVE_CUTOUT:
                    lines.write(json.dumps({"key": task.key, "etag": task.etag, "size": task.size}) + "\n")
                    count += 1
    return count


def _tasks(job: Job, store: Store, ledger: Ledger) -> Iterator[list[ImageTask]]:
    """Part by part; of a live job also what stands in no part yet. That first: recorded meanwhile, it comes twice, and
    counts once."""
    if waiting := read_unrecorded(job, first=0, count=_MAX_UNRECORDED, ledger=ledger):
        yield waiting
    for number in range(ledger.job(job.id).parts):
        yield read_part(store, job, number)
