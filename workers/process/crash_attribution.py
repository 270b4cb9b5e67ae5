"""Attribute the end of a process to the images that it was computing, in the ledger. Imports nothing heavy: the
listener of `workers/process/crash_reporter.py` uses it."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Self

from jobs.errors import ContentError, CutfleetError
from jobs.job import ImageState
from jobs.ledger import Ledger
from jobs.ledger.window import Claim, ClaimOutcome, Recorded
from jobs.results import Failure
from workers.process.task_outcome import TaskOutcome

_MAX_TEXT = 300


class FatalFault(Exception):
    """A fault that ends a worker or a decode subprocess, perhaps because of an image. Equal faults have equal messages:
    a suspect that the same fault is reported for twice, the second time in isolation, fails with `code`."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code

    def as_image_error(self) -> ContentError:
        return ContentError(str(self)[:_MAX_TEXT], code=self.code)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InFlightImage:
    """An image that this worker has claimed. `isolated`: nothing else is computed in the worker meanwhile."""

    claim: Claim
    key: str
    worker: str
    lease_s: float
    isolated: bool

    def report(self, fault: FatalFault, ledger: Ledger) -> TaskOutcome:
        """Fail the image if the ledger has this fault for it already and it is isolated now; else requeue it with this
        fault as its last error. Raises `RedisUnavailable`."""
        error = fault.as_image_error()
        if self.isolated and self.claim.last_error == str(error):
            return self.fail(error, ledger)
        recorded = ledger.window.report_crash(self.claim, str(error), lease_s=self.lease_s)
        return TaskOutcome.CRASH_REPORTED if recorded is Recorded.OK else TaskOutcome(recorded)

    def fail(self, error: CutfleetError, ledger: Ledger) -> TaskOutcome:
        """Make the image a dead letter. Raises `RedisUnavailable`."""
        failure = Failure(self.key, error.code, str(error), self.claim.tries + 1, time.time(), self.worker)
        recorded = ledger.window.finish(self.claim, ImageState.FAILED, failure)
        return TaskOutcome.FAILED if recorded is Recorded.OK else TaskOutcome(recorded)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        fields = json.loads(text)
        claim = fields["claim"]
        return cls(**fields | {"claim": Claim(**claim | {"outcome": ClaimOutcome(claim["outcome"])})})
