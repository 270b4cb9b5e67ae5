"""One attempt at an image that this worker has claimed: what the functions of every `JobKind` get."""

from __future__ import annotations

import dataclasses
import time

from jobs.job import Job
from jobs.ledger.window import Claim
from jobs.message import BadMessage, ImageTask
from jobs.s3.names import ImagePaths
from workers.process.context import WorkerContext
from workers.process.image_context import ImageContext
from workers.process.leases import Leases
from workers.tasks.publish import Target


class SharedClock:
    """Time of one image, divided by the mean number of images in flight: the times of all images add up to the time in
    which the worker had any."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._started, self._in_flight = time.monotonic(), leases.in_flight()

    def read_s(self) -> float:
        in_flight = (self._in_flight + self._leases.in_flight()) / 2
        return (time.monotonic() - self._started) / max(1.0, in_flight)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    task: ImageTask
    job: Job
    paths: ImagePaths
    context: ImageContext
    clock: SharedClock

    @property
    def worker(self) -> WorkerContext:
        return self.context.worker

    @property
    def claim(self) -> Claim:
        return self.context.image.claim

    def is_ours(self) -> bool:
        """Renew the lease in the ledger; False when another worker has the image."""
        return self.worker.leases.is_ours(self.claim)

    def check_allowed(self) -> None:
        """Check the message against its job, and the job against the allowlist: someone who can write to Redis must not
        be able to read or write elsewhere. Raises `BadMessage`, `SourceError` or `OutputError`."""
        if not self.task.key.startswith(self.job.source.key):
            raise BadMessage(
                f"The message names {self.task.key!r}, which is not under its job's source {self.job.source}."
            )
        self.worker.store.check_allowed(self.paths.source, "source")
        for location in (self.paths.cutout, self.paths.mask):
            self.worker.store.check_allowed(location, "output")

    def find_target(self) -> Target:
        """Return where the results go. Raises `OutputError` for a rendition path that is not valid or not allowed."""
        target = Target.of(self.job, self.task.key)
        for location in target.renditions.values():
            self.worker.store.check_allowed(location, "output")
        return target
