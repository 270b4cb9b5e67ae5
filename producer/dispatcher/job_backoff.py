"""Backoff of jobs whose feeding or closing failed, as by a store that refuses or a damaged record; other jobs are not
delayed. Kept in the memory of one dispatcher: the next one meets the error again."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Literal

from jobs.errors import JobError, SettingsError
from jobs.job import Job
from jobs.logs import RepeatedErrors

log = logging.getLogger(__name__)

BACKOFF_S = 5.0
"""Pause before a job is tried again, so that many such jobs do not take up every turn."""


@dataclasses.dataclass
class _Backoff:
    errors: RepeatedErrors
    until: float = 0.0


class JobBackoff:
    """Not safe for threads."""

    def __init__(self) -> None:
        self._jobs: dict[str, _Backoff] = {}

    def is_active(self, job: Job) -> bool:
        return job.id in self._jobs and time.monotonic() < self._jobs[job.id].until

    def start(self, job: Job, error: Exception, *, failed_step: Literal["feed", "close"]) -> None:
        """Leave the job for `BACKOFF_S`; log the error once for each cause."""
        if job.id not in self._jobs:
            self._jobs[job.id] = _Backoff(RepeatedErrors(log, action="dispatch", job=job.id))
        backoff = self._jobs[job.id]
        backoff.until = time.monotonic() + BACKOFF_S
        if isinstance(error, SettingsError) and not isinstance(error, JobError):
            backoff.errors.log(error, "job needs a newer dispatcher: %s", level=logging.WARNING)
        else:
            backoff.errors.log(error, f"{failed_step} failed, will be retried: %s")

    def keep(self, jobs: Sequence[Job]) -> None:
        """Forget all other jobs."""
        self._jobs = {job.id: self._jobs[job.id] for job in jobs if job.id in self._jobs}
