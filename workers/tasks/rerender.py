"""Renditions made again from the stored cutout, without source and model: after a marketplace changed its rules, say.

The cutout's bytes and the mask stay; the cutout is written once more for its metadata, which names what now stands
beside it. `Job.recipe` comes from `producer/submission/rerender.py`: what made the cutout is the first job's, the rest is new.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from jobs.errors import SourceError, TransientError
from jobs.message import ImageTask
from jobs.s3.client import S3Object, Store
from workers.imaging.decode import Limits
from workers.imaging.pipeline import render_outputs
from workers.process.image_context import Seat
from workers.tasks.publish import Outcome, Provenance, Target, find_existing, is_complete, outcome_of, publish

_BYTES_PER_PIXEL = 5
"""Most that a cutout of ours may take: four, and what filters and headers add."""


def render_again(
    task: ImageTask, target: Target, seat: Seat, *, store: Store, limits: Limits, is_ours: Callable[[], bool]
) -> Outcome:
    """Raises `SourceError` `cutout_missing`, `ContentError`, and what `publish` raises. Safe to repeat."""
    existing = find_existing(target, store)
    if existing.cutout is None:
        raise SourceError(
            f"There is no cutout at {target.names.cutout}: submit the image, then render it.", code="cutout_missing"
        )
    provenance = _provenance(existing.cutout.metadata, target, task.job)
    if is_complete(existing, provenance, target, store):
        return existing.outcome(task.job, task.key)
    data = fetch_cutout(existing.cutout, store, target, limits)
    with seat.room(data):
        with seat.computing():
            image = seat.decode(data, limits=cutout_limits(limits), animation="first")
            alpha = np.full(image.rgb.shape[:2], 255, np.uint8) if image.alpha is None else image.alpha
            outputs = render_outputs(image, alpha, target.recipe, text=provenance.to_text())
        outputs = dataclasses.replace(outputs, cutout=data)
        publish(outputs, target, provenance, store=store, existing=existing, is_ours=is_ours)
        return outcome_of(outputs.remark(task.key))


def fetch_cutout(found: S3Object, store: Store, target: Target, limits: Limits) -> bytes:
    """What was `found` there; raises `TransientError` when it was replaced meanwhile."""
    data, etag = store.get(target.names.cutout, role="output", max_bytes=cutout_limits(limits).max_bytes)
    if etag != found.etag:
        raise TransientError(f"{target.names.cutout} was replaced meanwhile.", code="output_conflict")
    return data


def cutout_limits(limits: Limits) -> Limits:
    """Of a cutout whose source was within `limits`."""
    return dataclasses.replace(limits, max_bytes=limits.max_pixels * _BYTES_PER_PIXEL)


def _provenance(told: Mapping[str, str], target: Target, job: str) -> Provenance:
    """As the cutout's metadata has it, but for the renditions' part of the fingerprint, and the job."""
    made_by = told.get("cf-fingerprint", "").partition("-")[0]
    return Provenance(
        source=told["cf-source"],
        source_etag=told.get("cf-source-etag", ""),
        fingerprint=f"{made_by}-{target.recipe.rendition_fingerprint()}",
        model=told.get("cf-model", ""),
        revision=told.get("cf-revision", ""),
        licence=told.get("cf-licence", ""),
        job=job,
    )
