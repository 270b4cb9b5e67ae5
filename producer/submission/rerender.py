"""Submits a job that makes renditions again from the cutouts of another job, by another recipe and without a model."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from jobs.errors import JobError
from jobs.job import Job, JobKind
from jobs.ledger import Ledger
from jobs.message import RENDER_POOL, Lane
from jobs.recipe import Recipe
from jobs.s3.client import Store
from producer.records.manifest import ManifestReader
from producer.submission.request import Request
from producer.submission.submit import submit


def submit_rerender(
    job: Job, recipe: Recipe, *, lane: Lane, store: Store, ledger: Ledger, lease_s: float, listed: Callable[[int], None]
) -> Job:
    """Submit a job for the images of `job` that have a cutout now. It uses the renditions of `recipe`, their names,
    rules, delivery and review; the cutout's own settings stay. Raises `JobError` `nothing_to_render`, and what `submit`
    raises."""
    cut = job.recipe
    merged = dataclasses.replace(
        recipe,
        model=RENDER_POOL,
        edges=cut.edges,
        alpha=cut.alpha,
        animation=cut.animation,
        keep_credit=cut.keep_credit,
    )
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", prefix="cutfleet-") as manifest:
        if not _write_keys(job, Path(manifest.name), store, ledger):
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
            kind=JobKind.RENDER,
        )
        return submit(request, store=store, ledger=ledger, lease_s=lease_s, listed=listed)


def _write_keys(job: Job, to: Path, store: Store, ledger: Ledger) -> int:
    """Write the images that have a cutout; return how many."""
    count = 0
    with to.open("w", encoding="utf-8") as lines:
        for tasks in ManifestReader(job, store, ledger).all():
            states = ledger.images.states(job.id, tasks[0].index, len(tasks))
            for task, state in zip(tasks, states, strict=True):
                if state.has_outputs:
                    lines.write(json.dumps({"key": task.key, "etag": task.etag, "size": task.size}) + "\n")
                    count += 1
    return count
