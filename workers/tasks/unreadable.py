"""Messages that this worker can't process: of a later version, or malformed."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from typing import Any

from jobs.errors import CutfleetError, ImageFailed
from jobs.ledger.window import ClaimOutcome
from jobs.message import BadMessage, is_valid
from jobs.s3.location import MAX_KEY_BYTES
from workers.process.context import WorkerContext
from workers.process.crash_attribution import InFlightImage
from workers.process.task_outcome import TaskOutcome
from workers.tasks.retry import record_with_retry

log = logging.getLogger(__name__)


def drop_later_version(why: CutfleetError, worker: WorkerContext, *, lane: str) -> TaskOutcome:
    """Drop the message of a later version. The dispatcher publishes the image again after each lease, until a worker of
    that version takes it. No attempt is used up."""
    log.warning("needs a newer worker: %s", why, extra={"action": "image"})
    worker.metrics.count_outcome(lane, TaskOutcome.LATER_VERSION)
    return TaskOutcome.LATER_VERSION


def fail_malformed(fields: Mapping[str, Any], why: BadMessage, worker: WorkerContext, *, lane: str) -> TaskOutcome:
    """Fail the image that the message names: no worker will ever read it. Raises `ImageFailed` when that is
    recorded."""
    log.error("malformed message: %s", why, extra={"action": "image", "code": why.code})
    if not is_valid("job", fields.get("job")) or not is_valid("index", fields.get("index")):
        return TaskOutcome.GONE
    image_id, lease_s = f"{fields['job']}:{fields['index']}", worker.leases.lease_s
    # Nothing is written to S3, so the claim needs no output's name.
    claim = worker.ledger.window.claim(
        image_id, token=uuid.uuid4().hex, output=image_id, lease_s=lease_s, isolated=True
    )
    if claim.outcome is not ClaimOutcome.GO:
        return TaskOutcome(claim.outcome)
    key = str(fields.get("key"))[:MAX_KEY_BYTES].encode(errors="replace").decode()
    image = InFlightImage(claim=claim, key=key, worker=worker.node, lease_s=lease_s, isolated=True)
    outcome = record_with_retry(lambda: image.fail(why, worker.ledger), within_s=lease_s)
    if outcome is not TaskOutcome.FAILED:
        return outcome
    worker.metrics.count_outcome(lane, outcome, why)
    raise ImageFailed(why.code)
