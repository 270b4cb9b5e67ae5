"""The Celery task: claim an image, do what its job's kind asks (cut out, render again, preview), record the result.

A worker may be killed at any line: the lease ends and another worker repeats the attempt. Publishing is conditional,
recording counts once, and an image whose outputs are complete is only recorded.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from celery import Celery
from celery.exceptions import Reject

from jobs.envelope import TASK_NAME
from jobs.errors import DeviceLost, ImageError, ImageFailed, JobError, SettingsError, TransientError
from jobs.job import Job, JobKind
from jobs.ledger.window import Claim, ClaimOutcome
from jobs.message import BadMessage, ImageTask, LaterMessage
from workers.process.context import WorkerContext
from workers.process.crash_attribution import FatalFault, InFlightImage
from workers.process.image_context import ImageContext
from workers.process.leases import Draining
from workers.process.task_outcome import TaskOutcome
from workers.tasks.attempt import Attempt, SharedClock
from workers.tasks.cut import cut_and_publish
from workers.tasks.preview import write_preview
from workers.tasks.publish import Result
from workers.tasks.record import (
    Ending,
    fail,
    finish,
    release,
    report_crash,
    report_device_lost,
    report_fault,
    report_memory_exhausted,
    retry_later,
    retry_unexpected,
)
from workers.tasks.rerender import rerender_and_publish
from workers.tasks.retry import ServiceAwayTooLong, record_with_retry, wait_while_away
from workers.tasks.unreadable import drop_later_version, fail_malformed

log = logging.getLogger(__name__)

_WORK: Mapping[JobKind, Callable[[Attempt], Result]] = {
    JobKind.CUT: cut_and_publish,
    JobKind.RENDER: rerender_and_publish,
    JobKind.PREVIEW: write_preview,
}

_ON_ERROR: tuple[tuple[type[Exception], Callable[[Attempt, Any], Ending]], ...] = (
    (Draining, release),
    (ServiceAwayTooLong, release),
    (FatalFault, report_fault),
    (MemoryError, report_memory_exhausted),
    (DeviceLost, report_device_lost),
    (ImageError, fail),
    (TransientError, retry_later),
    (Exception, retry_unexpected),
)
"""What each error leads to; the first match counts."""


def register(app: Celery, worker: WorkerContext) -> None:
    """Add the task to the app."""

    @app.task(name=TASK_NAME, bind=True, ignore_result=True)  # type: ignore[untyped-decorator]  # Celery has no types
    def image(self: Any, task: Mapping[str, Any]) -> str:
        lane = str(self.request.delivery_info["routing_key"]).partition(".")[0]
        try:
            parsed = ImageTask.from_fields(task)
        except LaterMessage as exc:
            return drop_later_version(exc, worker, lane=lane).value
        except BadMessage as exc:
            return fail_malformed(task, exc, worker, lane=lane).value
        return run_image(parsed, worker, isolated=lane == "suspect").value


def run_image(task: ImageTask, worker: WorkerContext, *, isolated: bool) -> TaskOutcome:
    """Return the outcome, for Flower. `isolated`: nothing else may run meanwhile. Raises `ImageFailed` after a failure
    is recorded, `Reject` when this worker can't take the image now."""
    if worker.draining.is_set():
        raise Reject("draining", requeue=True)
    with worker.gate.exclusive() if isolated else worker.gate.shared() as entered:
        if not entered:
            raise Reject("draining, or busy with a suspect", requeue=True)
        return _run(task, worker, isolated=isolated)


def _run(task: ImageTask, worker: WorkerContext, *, isolated: bool) -> TaskOutcome:
    started = time.monotonic()
    try:
        job = worker.find_job(task.job)
    except JobError:
        return TaskOutcome.GONE
    except SettingsError as exc:
        return drop_later_version(exc, worker, lane=task.lane)
    output, lease_s = str(job.paths(task.key).cutout), worker.leases.lease_s
    token = uuid.uuid4().hex
    claim = worker.ledger.window.claim(task.id, token=token, output=output, lease_s=lease_s, isolated=isolated)
    worker.metrics.count_claim(claim, task.lane)
    if claim.outcome is not ClaimOutcome.GO:
        return TaskOutcome(claim.outcome)
    with worker.leases.renewing(claim):
        ending = _attempt(_start_attempt(task, job, claim, worker, isolated=isolated))
    worker.metrics.count_outcome(task.lane, ending.outcome, ending.error)
    _log(ending, task, claim, seconds=time.monotonic() - started)
    if ending.outcome is TaskOutcome.FAILED and ending.error is not None:
        raise ImageFailed(ending.error.code)
    return ending.outcome


def _start_attempt(task: ImageTask, job: Job, claim: Claim, worker: WorkerContext, *, isolated: bool) -> Attempt:
    lease_s, window = worker.leases.lease_s, worker.ledger.window
    image = InFlightImage(claim=claim, key=task.key, worker=worker.node, lease_s=lease_s, isolated=isolated)
    context = ImageContext(
        image=image,
        live=task.lane == "live",
        worker=worker,
        report_crash=lambda fault: report_crash(image, fault, worker),
        mark_isolated=lambda begins: record_with_retry(
            lambda: window.mark_isolated(claim, begins=begins), within_s=lease_s
        ),
    )
    clock = SharedClock(worker.leases)
    return Attempt(task=task, job=job, paths=job.paths(task.key), context=context, clock=clock)


def _attempt(attempt: Attempt) -> Ending:
    try:
        attempt.check_allowed()
        result = wait_while_away(lambda: _WORK[attempt.job.kind](attempt), attempt)
    except Exception as error:
        record = next(record for kind, record in _ON_ERROR if isinstance(error, kind))
        return record(attempt, error)
    return finish(attempt, result)


def _log(ending: Ending, task: ImageTask, claim: Claim, *, seconds: float) -> None:
    names = {"action": "image", "job": task.job, "image": task.index, "key": task.key}
    fields = names | {"attempt": claim.tries + 1, "seconds": round(seconds, 3)}
    if ending.error is None:
        log.info(ending.outcome, extra=fields)
    else:
        log.warning("%s: %s", ending.outcome, ending.error, extra=fields | {"code": ending.error.code})
