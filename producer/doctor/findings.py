"""A finding of `cutfleet doctor`: level, sentence, remedy."""

from __future__ import annotations

import dataclasses
import enum
import time
from collections.abc import Callable, Iterable, Iterator

from jobs.errors import CutfleetError


class Level(enum.StrEnum):
    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclasses.dataclass(frozen=True)
class Finding:
    """`code` is stable; empty if `level` is OK, as `remedy` is."""

    level: Level
    area: str
    code: str
    what: str
    remedy: str = ""

    def lines(self) -> Iterator[str]:
        yield f"{self.level:8} {self.area:9} {self.what}" + ("" if self.level is Level.OK else f" [{self.code}]")
        if self.remedy:
            yield f"{'':18} -> {self.remedy}"


REMEDIES = {
    "settings": "Correct or unset these variables where this process is started.",
    "redis_unreachable": "Start it, open the network to it, or correct CUTFLEET_REDIS_URL.",
    "redis_denied": "Set the right user and password in CUTFLEET_REDIS_URL; infra/redis/users.acl lists the rights "
    "that each role's user needs.",
    "redis_full": "Raise maxmemory, or start workers so that the queues drain.",
    "redis_cannot_save": "Free space on its disk or correct its permissions; it refuses writes until then.",
    "store_unreachable": "Correct CUTFLEET_S3_ENDPOINT (empty for AWS), or open the network to it.",
    "store_denied": "Correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the role; set this machine's clock.",
    "bucket_missing": "Create the bucket, or correct its name.",
    "source_denied": "Give our credentials s3:ListBucket on the source's bucket and s3:GetObject on its objects.",
    "output_denied": "Give our credentials s3:PutObject and s3:GetObject on the destination's objects, and "
    "s3:ListBucket on its bucket: without it, S3 answers 403 for an object that does not exist.",
    "source_not_allowed": "Add it, with a final slash, to CUTFLEET_SOURCES of every process; or use another prefix.",
    "output_not_allowed": "Add it, with a final slash, to CUTFLEET_DESTINATIONS of every process; or use "
    "another prefix.",
    "destination_under_source": "Choose a destination elsewhere, or a longer source prefix.",
}
"""By the code of the error that a check raises."""
_DEFAULT_REMEDY = "Try again in a minute; if it remains, read the server's own log."


def is_well(findings: Iterable[Finding]) -> bool:
    return all(finding.level is not Level.ERROR for finding in findings)


def catch(area: str, check: Callable[[], Iterator[Finding] | None]) -> Iterator[Finding]:
    """Yield the findings of `check`, and one for the error of ours that ends it."""
    try:
        yield from check() or ()
    except CutfleetError as exc:
        yield from_error(area, exc)


def from_error(area: str, exc: CutfleetError) -> Finding:
    return error(area, exc.code, str(exc), REMEDIES.get(exc.code, _DEFAULT_REMEDY))


def timed_ms(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1000


def ok(area: str, what: str) -> Finding:
    return Finding(Level.OK, area, "", what)


def warning(area: str, code: str, what: str, remedy: str) -> Finding:
    return Finding(Level.WARNING, area, code, what, remedy)


def error(area: str, code: str, what: str, remedy: str) -> Finding:
    return Finding(Level.ERROR, area, code, what, remedy)
