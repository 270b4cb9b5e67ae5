"""Payloads of webhooks as receivers get them: id, body and signed headers, by Standard Webhooks.

`webhook-id` is the same for each delivery and replay of an event, so that a receiver can drop duplicates; an event that
happens again, as after a retry, has another one. `webhook-signature` is `v1,` and the HMAC-SHA256 of
"id.timestamp.body" in base64. Bodies describe the state at the time of delivery.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import hmac
import json
import time
from collections.abc import Mapping
from typing import Any

from jobs.job import ImageState, Job
from jobs.ledger.images import ImageResult
from jobs.message import ImageTask


@dataclasses.dataclass(frozen=True)
class Payload:
    id: str
    body: bytes

    def signed_headers(self, secrets: str, *, now: float) -> dict[str, str]:
        """`secrets`: one or two of `whsec_...`, separated by a space. `now`: Unix time."""
        timestamp = str(int(now))
        content = f"{self.id}.{timestamp}.".encode() + self.body
        keys = [base64.b64decode(secret.removeprefix("whsec_")) for secret in secrets.split()]
        signatures = [base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode() for key in keys]
        return {
            "Content-Type": "application/json",
            "User-Agent": "cutfleet",
            "webhook-id": self.id,
            "webhook-timestamp": timestamp,
            "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
        }


def job_payload(job: Job) -> Payload:
    """Return the payload of `job.closed`."""
    data = job.summary() | {"report": str(job.record_path("report/"))}
    return _make_payload("job.closed", f"{job.id}-closed-{round(1000 * (job.closed or 0))}", data)


def image_payload(job: Job, task: ImageTask, result: ImageResult) -> Payload:
    """Return the payload of `image.done`, `image.failed`, `image.skipped` or `image.cancelled`."""
    needs_review = result.state is ImageState.REVIEW
    state = "done" if needs_review else result.state.name.lower()
    paths = job.paths(task.key)
    data = {
        "job": job.id,
        "index": task.index,
        "source": str(paths.source),
        "state": state,
        "review": needs_review,
    }
    if result.state.has_outputs:
        data |= {"cutout": str(paths.cutout), "mask": str(paths.mask)}
    elif result.failure:
        data |= {"code": result.failure.code, "message": result.failure.message}
    reopened = f"-{result.reopened}" if result.reopened else ""
    return _make_payload(f"image.{state}", f"{job.id}-{task.index}-{state}{reopened}", data)


def _make_payload(event_type: str, event_id: str, data: Mapping[str, Any]) -> Payload:
    timestamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    body = json.dumps({"type": event_type, "timestamp": timestamp, "data": data}, ensure_ascii=False)
    return Payload(event_id, body.encode())
