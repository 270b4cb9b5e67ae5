"""A finding of `cutfleet doctor`: level, sentence, remedy."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Iterator


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
    "disk_full": "Free some space, or set TMPDIR.",
    "redis_unreachable": "Start it, open the network to it, or correct CUTFLEET_REDIS_URL.",
    "redis_denied": "Set the right user and password in CUTFLEET_REDIS_URL; infra/redis/users.acl lists the rights "
    "that each role's user needs.",
    "redis_slow": "Move Redis nearer to the workers: an image costs some ten round trips.",
    "redis_old": "Move to Valkey 8 or later, or to Redis 7.2 or later; either reads its append-only file.",
    "redis_cluster": "Use one primary, with replicas if needed: cluster-enabled no.",
    "redis_replica": "Point CUTFLEET_REDIS_URL at the primary.",
    "redis_full": "Raise maxmemory, or start workers so that the queues drain.",
    "redis_nearly_full": "Raise maxmemory, or start workers so that the queues drain.",
    "redis_evicts": "Set maxmemory-policy noeviction: a dropped key is a lost job or image.",
    "redis_cannot_save": "Free space on its disk or correct its permissions; it refuses writes until then.",
    "redis_forgets": "Set appendonly yes, or run replicas that take over. `cutfleet audit` rebuilds lost jobs from S3.",
    "clock_differs": "Run NTP on both: S3 refuses a clock that is 15 minutes wrong, and logs can't be ordered by time.",
    "store_unreachable": "Correct CUTFLEET_S3_ENDPOINT (empty for AWS), or open the network to it.",
    "store_denied": "Correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the role; set this machine's clock.",
    "bucket_missing": "Create the bucket, or correct its name.",
    "source_denied": "Give our credentials s3:ListBucket on the source's bucket and s3:GetObject on its objects.",
    "output_denied": "Give our credentials s3:PutObject and s3:GetObject on the destination's objects, and "
    "s3:ListBucket on its bucket: without it, S3 answers 403 for an object that does not exist.",
    "source_not_allowed": "Add it, with a final slash, to CUTFLEET_SOURCES of every process; or use another prefix.",
    "output_not_allowed": "Add it, with a final slash, to CUTFLEET_DESTINATIONS of every process; or use another.",
    "destination_under_source": "Choose a destination elsewhere, or a longer source prefix.",
    "source_empty": "Correct the prefix: S3 compares it with the beginning of each key.",
    "conditions_ignored": "Use a store that supports conditional writes, or give every job a destination of its own.",
    "s3_slow": "Use buckets in the workers' region; check the network between them.",
    "no_dispatcher": "Start one: cutfleet dispatch. A second one may run on standby.",
    "no_workers": "Start one for each GPU: python -m workers.",
    "versions_differ": "Restart it with this version; old and new workers can run side by side until then.",
    "worker_stuck": "Check its log and nvidia-smi, then restart it: others take its images when their leases end.",
    "gpu_not_used": "Set CUTFLEET_DEVICE=cuda, whose error names the reason, or serve u2netp.",
    "models_differ": "Pin one with CUTFLEET_MODEL_REVISION and restart them: one model must make all images of a job.",
    "live_waits": "Start more workers, or check the findings above for why the running ones are slow.",
}
"""By the code of a finding, or of the error that ends a check."""
_DEFAULT_REMEDY = "Try again in a minute; if it remains, read the server's own log."


def is_well(findings: Iterable[Finding]) -> bool:
    return all(finding.level is not Level.ERROR for finding in findings)


def ok(area: str, what: str) -> Finding:
    return Finding(Level.OK, area, "", what)


def warning(area: str, code: str, what: str, *, remedy: str = "") -> Finding:
    return Finding(Level.WARNING, area, code, what, remedy or REMEDIES[code])


def error(area: str, code: str, what: str, *, remedy: str = "") -> Finding:
    return Finding(Level.ERROR, area, code, what, remedy or REMEDIES.get(code, _DEFAULT_REMEDY))
