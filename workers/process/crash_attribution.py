"""Who may be blamed when a process ends: what is written in the ledger of each image that it was computing. Nothing
heavy is imported here: the process that hears a worker's last word needs it too (`workers/process/crash_reporter.py`)."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Self

from jobs.errors import ContentError
from jobs.job import Failure, ImageState
from jobs.ledger import Claim, Ledger

_MAX_TEXT = 300


class Fatal(Exception):
    """Something that ends a process or a child, in a stable sentence, and perhaps by this image's fault: named by
    the same sentence twice, alone the second time, the image fails with `code`."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accused:
    """An image in a worker's hands. `alone`: nothing is computed beside it."""

    claim: Claim
    key: str
    worker: str
    lease_s: float
    alone: bool

    def told(self, error: Fatal) -> ContentError:
        return ContentError(str(error)[:_MAX_TEXT], code=error.code)

    def blame(self, error: Fatal, ledger: Ledger) -> str:
        """The second time, and alone, the image fails; else another worker takes it, and knows what it is blamed for.
        `failed`, `blamed`, or what the ledger says of an image that is not held any more."""
        if self.alone and self.claim.blamed == str(self.told(error)):
            recorded, outcome = ledger.finish(self.claim, ImageState.FAILED, self._failure(error)), "failed"
        else:
            recorded = ledger.vanish(self.claim, str(self.told(error)), lease_s=self.lease_s)
            outcome = "blamed"
        return outcome if recorded == "ok" else recorded

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        fields = json.loads(text)
        return cls(**fields | {"claim": Claim(**fields["claim"])})

    def _failure(self, error: Fatal) -> Failure:
        told = self.told(error)
        return Failure(self.key, told.code, str(told), self.claim.tries + 1, time.time(), self.worker)
