"""Outcome of one delivery of an image's message, as Flower and the metrics show it."""

from __future__ import annotations

import enum


class TaskOutcome(enum.StrEnum):
    """The values are labels of metrics, which dashboards and alerts use."""

    DONE = "done"
    REVIEW = "review"  # done, and flagged for review
    SKIPPED = "skipped"  # S3 already held the outputs
    FAILED = "failed"
    DEFERRED = "deferred"  # a retry is scheduled
    RELEASED = "released"  # given back to its queue; no attempt is used up
    CRASH_REPORTED = "blamed"  # a process ended, perhaps because of this image
    LATER_VERSION = "later"  # a later version wrote the message or the recipe; only its workers can read it
    SUSPECT = "suspect"  # not claimed: see `ClaimOutcome` for this and the next four
    BUSY = "busy"
    TAKEN = "taken"
    CANCELLED = "cancelled"
    GONE = "gone"
    FINAL = "final"  # the image was final before
    STALE = "stale"  # the lease was lost; nothing was recorded
