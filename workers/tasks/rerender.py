"""`JobKind.RENDER`: make renditions again from the stored cutout, without source and model; for example after a
marketplace changed its rules.

The bytes of cutout and mask stay. The cutout is written again for its metadata, which names the new renditions. The
job's recipe (`producer/submission/rerender.py`) has what made the cutout from the first job, and the renditions from
the new one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from jobs.errors import SourceError, TransientError
from jobs.s3.client import S3Object, Store
from workers.imaging.decode import DecodedImage, Limits
from workers.imaging.pipeline import render_outputs
from workers.imaging.pixels import Pixels
from workers.tasks.attempt import Attempt
from workers.tasks.publish import Provenance, Result, Target, find_existing, is_complete, make_result, publish

_BYTES_PER_PIXEL = 5
"""Most that our cutout may take: four, and what filters and headers add."""


def rerender_and_publish(attempt: Attempt) -> Result:
    """Raises `SourceError` `cutout_missing`, `ContentError`, and what `publish` raises. Safe to repeat."""
    worker, context = attempt.worker, attempt.context
    target = attempt.find_target()
    existing = find_existing(target, worker.store)
    if existing.cutout is None:
        raise SourceError(
            f"There is no cutout at {target.paths.cutout}: submit the image first, then render it.",
            code="cutout_missing",
        )
    provenance = _provenance(existing.cutout.metadata, target, attempt.job.id)
    if is_complete(existing, provenance, target, worker.store):
        return existing.result(attempt.job.id, attempt.task.key)
    data = fetch_cutout(existing.cutout, target, worker.store, worker.limits)
    with context.reserve_memory(data):
        with context.computing():
            image = context.decode(data, limits=cutout_limits(worker.limits), animation="first")
            outputs = render_outputs(image, alpha_of(image), target.recipe, text=provenance.to_text())
        outputs = dataclasses.replace(outputs, cutout=data)
        publish(outputs, target, provenance, store=worker.store, existing=existing, is_ours=attempt.is_ours)
        return make_result(outputs.note(attempt.task.key))


def fetch_cutout(found: S3Object, target: Target, store: Store, limits: Limits) -> bytes:
    """Return the bytes of the cutout `found`. Raises `TransientError` `output_conflict` if it was replaced since."""
    data, etag = store.get(target.paths.cutout, role="output", max_bytes=cutout_limits(limits).max_bytes)
    if etag != found.etag:
        raise TransientError(f"{target.paths.cutout} was replaced meanwhile.", code="output_conflict")
    return data


def cutout_limits(limits: Limits) -> Limits:
    """Return the limits of a cutout whose source is within `limits`."""
    return dataclasses.replace(limits, max_bytes=limits.max_pixels * _BYTES_PER_PIXEL)


def alpha_of(image: DecodedImage) -> Pixels:
    """Return (H, W) alpha; opaque if the image has none."""
    return np.full(image.rgb.shape[:2], 255, np.uint8) if image.alpha is None else image.alpha


def _provenance(metadata: Mapping[str, str], target: Target, job_id: str) -> Provenance:
    """Return the cutout's own provenance, with a new rendition part of the fingerprint and this job."""
    model_fingerprint = metadata.get("cf-fingerprint", "").partition("-")[0]
    return Provenance(
        source=metadata["cf-source"],
        source_etag=metadata.get("cf-source-etag", ""),
        fingerprint=f"{model_fingerprint}-{target.recipe.rendition_fingerprint()}",
        model=metadata.get("cf-model", ""),
        revision=metadata.get("cf-revision", ""),
        licence=metadata.get("cf-licence", ""),
        job=job_id,
    )
