"""Record in the ledger how an attempt ended. Recording is idempotent, and repeated while Redis is unavailable."""

from __future__ import annotations

import logging
from typing import NamedTuple

from jobs.errors import CutfleetError, DeviceLost, TransientError
from jobs.job import ImageState, JobKind
from jobs.ledger.window import Recorded
from jobs.results import Usage
from workers.process.context import WorkerContext
from workers.process.crash_attribution import FatalFault, InFlightImage
from workers.process.task_outcome import TaskOutcome
from workers.process.watchdog import MEMORY_EXHAUSTED
from workers.tasks.attempt import Attempt
from workers.tasks.publish import Result
from workers.tasks.retry import record_with_retry, retry_pause_s

log = logging.getLogger(__name__)


class Ending(NamedTuple):
    """How an attempt ended, as recorded. `error`: for the log and the metrics."""

    outcome: TaskOutcome
    error: CutfleetError | None = None


_OUTCOMES = {
    ImageState.DONE: TaskOutcome.DONE,
    ImageState.REVIEW: TaskOutcome.REVIEW,
    ImageState.SKIPPED: TaskOutcome.SKIPPED,
}


def finish(attempt: Attempt, result: Result) -> Ending:
    worker = attempt.worker
    worker_s = 0.0 if result.state is ImageState.SKIPPED else attempt.clock.read_s()
    usage = Usage(_fingerprint(attempt), worker_s)
    recorded = record_with_retry(
        lambda: worker.ledger.window.finish(attempt.claim, result.state, note=result.note, usage=usage),
        within_s=worker.leases.lease_s,
    )
    return Ending(_OUTCOMES[result.state] if recorded is Recorded.OK else TaskOutcome(recorded))


def fail(attempt: Attempt, error: CutfleetError) -> Ending:
    """Make the image a dead letter."""
    image, worker = attempt.context.image, attempt.worker
    outcome = record_with_retry(lambda: image.fail(error, worker.ledger), within_s=worker.leases.lease_s)
    return Ending(outcome, error if outcome is TaskOutcome.FAILED else None)


def retry_later(attempt: Attempt, error: TransientError) -> Ending:
    """Schedule another attempt, or fail the image after `CUTFLEET_MAX_TRIES`."""
    worker, claim = attempt.worker, attempt.claim
    if claim.tries + 1 >= worker.settings.max_tries:
        return fail(attempt, error)
    pause_s = retry_pause_s(claim.tries, worker.settings)
    record_with_retry(lambda: worker.ledger.window.retry_later(claim, pause_s=pause_s), within_s=worker.leases.lease_s)
    return Ending(TaskOutcome.DEFERRED, error)


def retry_unexpected(attempt: Attempt, error: Exception) -> Ending:
    log.error("unexpected error", exc_info=error, extra={"action": "image", "image": attempt.task.id})
    return retry_later(attempt, TransientError(f"{type(error).__name__}: {error}", code="internal"))


def release(attempt: Attempt, error: Exception) -> Ending:
    """Give the image back to its queue; no attempt is used up."""
    worker = attempt.worker
    recorded = record_with_retry(
        lambda: worker.ledger.window.release(attempt.claim, lease_s=worker.leases.lease_s),
        within_s=worker.leases.lease_s,
    )
    outcome = TaskOutcome.RELEASED if recorded is Recorded.OK else TaskOutcome(recorded)
    return Ending(outcome, error if isinstance(error, CutfleetError) else None)


def report_fault(attempt: Attempt, fault: FatalFault) -> Ending:
    return report_crash(attempt.context.image, fault, attempt.worker)


def report_memory_exhausted(attempt: Attempt, _: MemoryError) -> Ending:
    return report_fault(attempt, MEMORY_EXHAUSTED)


def report_device_lost(attempt: Attempt, error: DeviceLost) -> Ending:
    """Report an image that the device failed with; release any other. The watchdog ends the process."""
    if error.on_device:
        return report_fault(attempt, FatalFault(str(error), code="crashed_device"))
    return release(attempt, error)


def report_crash(image: InFlightImage, fault: FatalFault, worker: WorkerContext) -> Ending:
    """Record that this process ends with `fault`, perhaps because of `image`."""
    outcome = record_with_retry(lambda: image.report(fault, worker.ledger), within_s=worker.leases.lease_s)
    return Ending(outcome, fault.as_image_error())


def _fingerprint(attempt: Attempt) -> str:
    """Return the fingerprint that made the outputs; empty if this worker's model did not."""
    if attempt.job.kind is not JobKind.CUT:
        return ""
    model = attempt.worker.model
    return attempt.job.fingerprint(model_revision=model.revision, input_size=model.input_size)
