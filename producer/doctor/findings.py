"""What `cutfleet doctor` says: a level, a sentence, and what to do about it."""

from __future__ import annotations

import dataclasses
import enum
import time
from collections.abc import Callable, Iterable, Iterator

from jobs.errors import CutfleetError

SLOW_S3_MS = 1000.0


class Level(enum.StrEnum):
    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclasses.dataclass(frozen=True)
class Finding:
    """`code` is stable. `remedy` is empty for what is well."""

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
    "redis_denied": "Put the right user and password into CUTFLEET_REDIS_URL; the rights that each role's "
    "user needs stand in infra/redis/users.acl.",
    "redis_full": "Raise maxmemory, or start workers so that the queues drain.",
    "redis_cannot_save": "Free its disk or mend its rights; until then it takes no writes.",
    "store_unreachable": "Correct CUTFLEET_S3_ENDPOINT (empty for AWS), or open the network to it.",
    "store_denied": "Correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the role; set this machine's clock.",
    "bucket_missing": "Create the bucket, or correct its name.",
    "source_denied": "Give our credentials s3:ListBucket on the source's bucket and s3:GetObject on its objects.",
    "output_denied": "Give our credentials s3:PutObject and s3:GetObject on the destination's objects, and "
    "s3:ListBucket on its bucket: without it, S3 answers 403 where nothing is yet.",
    "source_not_allowed": "Add it, with a slash at its end, to CUTFLEET_SOURCES of every process; or use another.",
    "output_not_allowed": "Add it, with a slash at its end, to CUTFLEET_DESTINATIONS of every process; or use another.",
    "destination_under_source": "Choose a destination elsewhere, or a longer source prefix.",
}
_ANY_REMEDY = "Try again in a minute; if it stays, look into the server's own log."


def is_well(findings: Iterable[Finding]) -> bool:
    return all(found.level is not Level.ERROR for found in findings)


def tried(area: str, what: str, call: Callable[[], object]) -> Iterator[Finding]:
    try:
        took_ms = timed_ms(call)
    except CutfleetError as exc:
        yield failed(area, exc)
        return
    if took_ms > SLOW_S3_MS:
        yield warning(
            area,
            "s3_slow",
            f"{what[0].upper()}{what[1:]}, which took {took_ms / 1000:.1f} s.",
            "Use buckets in the workers' region; look at the network between.",
        )
    else:
        yield ok(area, f"{what[0].upper()}{what[1:]}, in {took_ms:.0f} ms.")


def caught(area: str, check: Callable[[], Iterator[Finding] | None]) -> Iterator[Finding]:
    """An error of ours that ends a check is a finding itself."""
    try:
        yield from check() or ()
    except CutfleetError as exc:
        yield failed(area, exc)


def failed(area: str, exc: CutfleetError) -> Finding:
    return error(area, exc.code, str(exc), REMEDIES.get(exc.code, _ANY_REMEDY))


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
