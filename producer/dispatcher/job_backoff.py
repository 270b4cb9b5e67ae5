"""Jobs that something holds up, a store that refuses or a record that is damaged: each is tried again after a pause,
and the others go on meanwhile. Of one process, in memory: another finds out by itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from jobs.errors import CutfleetError, JobError, SettingsError
from jobs.job import Job

log = logging.getLogger(__name__)

HELD_UP_S = 5.0
"""Before it is tried again: many such jobs must not be all that the dispatcher does."""


class HeldUp:
    """Not safe for threads."""

    def __init__(self) -> None:
        self._jobs: dict[str, tuple[str, float]] = {}  # code of the cause, and until when it is not tried again

    def waits(self, job: Job) -> bool:
        return self._jobs.get(job.id, ("", 0.0))[1] > time.monotonic()

    def note(self, job: Job, why: Exception, *, undone: str) -> None:
        """Says it once for each cause. `undone`: `fed` or `closed`."""
        code = why.code if isinstance(why, CutfleetError) else type(why).__name__
        known, _ = self._jobs.get(job.id, ("", 0.0))
        self._jobs[job.id] = code, time.monotonic() + HELD_UP_S
        if known == code:
            return
        facts = {"action": "dispatch", "job": job.id, "code": code}
        if not isinstance(why, CutfleetError):
            log.error("a bug, or a fault nobody thought of", exc_info=why, extra=facts)
        elif isinstance(why, SettingsError) and not isinstance(why, JobError):
            log.warning("left for a newer dispatcher: %s", why, extra=facts)
        else:
            log.error("not %s yet: %s", undone, why, extra=facts)

    def keep(self, jobs: Sequence[Job]) -> None:
        """Forgets all others."""
        self._jobs = {job.id: self._jobs[job.id] for job in jobs if job.id in self._jobs}
