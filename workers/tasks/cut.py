"""`JobKind.CUT`: make mask, cutout and renditions from the source, with the model."""

from __future__ import annotations

from jobs.s3.names import source_digest
from workers.imaging.pipeline import cut_out
from workers.process.leases import Draining
from workers.tasks.attempt import Attempt
from workers.tasks.publish import NOTHING, Provenance, Result, find_existing, is_complete, make_result, publish


def cut_and_publish(attempt: Attempt) -> Result:
    """Look for complete outputs; else fetch the source, cut it out, publish. Safe to repeat."""
    task, worker, context = attempt.task, attempt.worker, attempt.context
    target = attempt.find_target()
    existing = NOTHING if _is_new(attempt) else find_existing(target, worker.store)
    if existing.cutout is not None:
        provenance = _provenance(attempt, source_etag=task.etag or _current_etag(attempt))
        if is_complete(existing, provenance, target, worker.store):
            return existing.result(attempt.job.id, task.key)
    data, etag = _fetch(attempt)
    provenance = _provenance(attempt, source_etag=etag)
    with context.reserve_memory(data):
        with context.computing():
            outputs = cut_out(
                data,
                target.recipe,
                context,
                limits=worker.limits,
                live=context.live,
                text=provenance.to_text(),
                decode=context.decode,
            )
        worker.metrics.observe_stages(outputs.seconds)
        with worker.metrics.time_stage("publish"):
            publish(outputs, target, provenance, store=worker.store, existing=existing, is_ours=attempt.is_ours)
        return make_result(outputs.note(task.key))


def _is_new(attempt: Attempt) -> bool:
    """Whether the listing found no cutout and this is the first attempt. If there is one after all, the conditional
    write fails, and the next attempt looks for it."""
    claim, job = attempt.claim, attempt.job
    return attempt.task.hint == "new" and job.conditional and not claim.tries and not claim.lost_workers


def _fetch(attempt: Attempt) -> tuple[bytes, str]:
    """Return the source and its ETag. Raises `Draining` after the download."""
    worker, task = attempt.worker, attempt.task
    with worker.metrics.time_stage("fetch"):
        fetched = worker.store.get(
            attempt.paths.source, role="source", etag=task.etag, max_bytes=worker.limits.max_bytes
        )
    if worker.draining.is_set():
        raise Draining
    return fetched


def _current_etag(attempt: Attempt) -> str:
    source = attempt.worker.store.head(attempt.paths.source, role="source")
    return source.etag if source else ""


def _provenance(attempt: Attempt, *, source_etag: str) -> Provenance:
    model = attempt.worker.model
    return Provenance(
        source=source_digest(attempt.paths.source),
        source_etag=source_etag,
        fingerprint=attempt.job.fingerprint(model_revision=model.revision, input_size=model.input_size),
        model=model.name,
        revision=model.revision,
        licence=model.terms,
        job=attempt.job.id,
    )
