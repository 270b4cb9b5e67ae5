"""What a job is and what may become of it and of its images: the words that ledger, workers and reports share."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Iterable, Mapping
from typing import Any

from jobs.message import Lane

_PARTS = 10_000
"""Redis counts in whole numbers: figures have four digits behind the point."""


class ImageState(enum.IntEnum):
    """The four bits of an image."""

    OPEN = 0  # listed; may be fed, queued, claimed, waiting for a retry. Any other may follow.
    DONE = 1  # mask and cutout are in S3. Final.
    FAILED = 2  # no retry can help, or the tries are used up; its failure says why. Final but for an explicit retry.
    SKIPPED = 3  # S3 already holds what this recipe makes of this source. Final.
    CANCELLED = 4  # the job was cancelled, and no worker held the image. Final.
    REVIEW = 5  # done, and flagged for a person to look at. Counted as done and as review. Final.


class JobState(enum.StrEnum):
    """Follows from a job's flags."""

    LISTING = "listing"  # more images may come: it is being listed, or a watch feeds it. Then running.
    RUNNING = "running"  # listed to the end. Then closed.
    PAUSED = "paused"  # nothing new is fed until a person unpauses it. Then as before.
    CANCELLING = "cancelling"  # nothing new is claimed; what is in work ends. Then closed.
    CLOSED = "closed"  # every image is final.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What the ledger knows of a job. `source` and `destination` are s3:// prefixes; times are seconds since 1970.
    `weight`: its share of a queue's room against other jobs'. `rate`: most images fed a second. `sample`: how many
    are fed before it pauses for a look. `again`: images to be fed once more. `window`: images fed and not final.
    `cancel_cursor`: of a cancelled job, up to where what nobody held is final.
    `spills`: parts of its failures that stand in S3. `judged_*`: counts when a person last unpaused it.
    `watch`: the watch that feeds it. `unrecorded`: live images that stand in no part of its manifest yet.
    `untold`: events that its webhook could not be told of. `asked`: which images of its source, for going on with a
    listing. `to_be_listed`: `cutfleet serve` lists it, since nobody waits for it. `review_of`: the job that this one
    makes previews of, and nothing else.
    """

    id: str
    name: str
    source: str
    destination: str
    recipe: str
    model: str
    lane: Lane
    conditional: bool
    created: float
    weight: int = 1
    rate: float | None = None
    sample: int | None = None
    watch: str = ""
    asked: str = ""
    to_be_listed: bool = False
    webhook: str = ""
    webhook_images: bool = False
    review_of: str = ""
    closed: float | None = None
    listed: bool = False
    paused: str | None = None
    cancelled: bool = False
    total: int = 0
    cursor: int = 0
    parts: int = 0
    unrecorded: int = 0
    untold: int = 0
    done: int = 0
    failed: int = 0
    skipped: int = 0
    cancelled_images: int = 0
    review: int = 0
    again: int = 0
    window: int = 0
    cancel_cursor: int = 0
    spills: int = 0
    judged_final: int = 0
    judged_failed: int = 0

    @property
    def final(self) -> int:
        return self.done + self.failed + self.skipped + self.cancelled_images

    @property
    def open(self) -> int:
        return self.total - self.final

    @property
    def state(self) -> JobState:
        if self.closed is not None:
            return JobState.CLOSED
        if self.cancelled:
            return JobState.CANCELLING
        if self.paused is not None:
            return JobState.PAUSED
        return JobState.RUNNING if self.listed else JobState.LISTING

    def to_fields(self) -> dict[str, str]:
        """What `create` writes; the rest is counted by the ledger itself."""
        names = ("name", "source", "destination", "recipe", "model", "lane", "watch")
        fields = {name: getattr(self, name) for name in names} | {"conditional": str(int(self.conditional))}
        pace = {"weight": self.weight, "rate": self.rate, "sample": self.sample}
        fields |= {name: str(value) for name, value in pace.items() if value is not None}
        flags = {"asked": self.asked, "webhook": self.webhook, "review_of": self.review_of}
        flags |= {name: "1" if getattr(self, name) else "" for name in ("webhook_images", "to_be_listed")}
        return fields | {name: value for name, value in flags.items() if value}

    def summary(self) -> dict[str, Any]:
        """What `--json` shows."""
        told = {"review_of": self.review_of} if self.review_of else {}
        return told | {
            "job": self.id,
            "name": self.name,
            "state": str(self.state),
            "total": self.total,
            "open": self.open,
            "done": self.done,
            "failed": self.failed,
            "skipped": self.skipped,
            "cancelled": self.cancelled_images,
            "review": self.review,
            "untold": self.untold,
            "source": self.source,
            "destination": self.destination,
            "model": self.model,
            "lane": self.lane,
            "weight": self.weight,
            "rate": self.rate,
            "created": self.created,
            "closed": self.closed,
        }


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why an image is `failed`. `at` in seconds since 1970."""

    key: str
    code: str
    message: str
    tries: int
    at: float
    worker: str

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Failure:
        """Fields that a later version adds are left out."""
        return cls(**{field.name: fields[field.name] for field in dataclasses.fields(cls)})

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)


@dataclasses.dataclass(frozen=True)
class Remark:
    """What there is to say of a done image. `review`: why a person should look at it. `figures`: of its mask.
    `rules`: by rendition, what its rules found: rule, verdict (pass, warn, fail), value, limit.
    """

    key: str
    review: tuple[str, ...] = ()
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)
    rules: Mapping[str, tuple[tuple[str, str, str, str], ...]] = dataclasses.field(default_factory=dict)

    @property
    def is_notable(self) -> bool:
        """Whether a person should hear of it; the others are only counted."""
        return bool(self.review) or any(worst_verdict(found) != "pass" for found in self.rules.values())

    def counts(self) -> dict[str, int]:
        """What it adds to its job's tally: `review REASON`, `rules RENDITION VERDICT`, and of its figures the sums."""
        counts = {f"review {reason}": 1 for reason in self.review}
        counts |= {f"rules {name} {worst_verdict(found)}": 1 for name, found in self.rules.items()}
        if self.figures:
            counts["measured"] = 1
        return counts | {f"sum {name}": round(value * _PARTS) for name, value in self.figures.items()}

    def complaints(self) -> list[str]:
        """Each rule that was not passed, in words."""
        return [
            f"{name}: {rule} {value} ({verdict}" + (f", {limit})" if limit else ")")
            for name, found in self.rules.items()
            for rule, verdict, value, limit in found
            if verdict != "pass"
        ]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, separators=(",", ":"))


def worst_verdict(found: Iterable[tuple[str, str, str, str]]) -> str:
    """fail, warn or pass."""
    verdicts = {verdict for _, verdict, _, _ in found}
    return "fail" if "fail" in verdicts else "warn" if "warn" in verdicts else "pass"


@dataclasses.dataclass(frozen=True)
class Effort:
    """What an image took, and what it was made by. `made`: the recipe's fingerprint with the worker's model, empty
    where that does not tell. `worker_s`: its share of a worker's time."""

    made: str
    worker_s: float

    def counts(self) -> dict[str, int]:
        counts = {"worker_ms": round(1000 * self.worker_s)} if self.worker_s else {}
        return counts | ({f"made {self.made}": 1} if self.made else {})


@dataclasses.dataclass(frozen=True)
class Tally:
    """Of a job's images: how many have each review reason, and each verdict by rendition; the mean of each figure of
    their masks; workers' time for those that were done; how many were made, or found, by each fingerprint."""

    review: Mapping[str, int]
    rules: Mapping[str, Mapping[str, int]]
    quality: Mapping[str, float]
    worker_s: float
    made: Mapping[str, int]

    @classmethod
    def of_counts(cls, counts: Mapping[str, int]) -> Tally:
        """`counts`: sums of what `Remark.counts` and `Effort.counts` give."""
        review: dict[str, int] = {}
        rules: dict[str, dict[str, int]] = {}
        quality: dict[str, float] = {}
        made: dict[str, int] = {}
        for word, count in sorted(counts.items()):
            match word.split(" "):
                case ["review", reason]:
                    review[reason] = count
                case ["rules", rendition, verdict]:
                    rules.setdefault(rendition, {})[verdict] = count
                case ["sum", figure]:
                    quality[figure] = round(count / _PARTS / counts["measured"], 4)
                case ["made", fingerprint]:
                    made[fingerprint] = count
        return cls(review, rules, quality, counts.get("worker_ms", 0) / 1000, made)


@dataclasses.dataclass(frozen=True)
class ManifestPart:
    """One part of the manifest: the least and the greatest key in it, and how many."""

    number: int
    first: str
    last: str
    count: int


def job_from_fields(job: str, fields: Mapping[str, str]) -> Job:
    def count(name: str) -> int:
        return int(fields.get(name, 0))

    return Job(
        id=job,
        name=fields["name"],
        source=fields["source"],
        destination=fields["destination"],
        recipe=fields["recipe"],
        model=fields["model"],
        lane="live" if fields["lane"] == "live" else "backfill",
        conditional=fields["conditional"] == "1",
        created=float(fields["created"]),
        weight=int(fields.get("weight", 1)),
        rate=float(fields["rate"]) if "rate" in fields else None,
        sample=int(fields["sample"]) if "sample" in fields else None,
        watch=fields.get("watch", ""),
        asked=fields.get("asked", ""),
        to_be_listed="to_be_listed" in fields,
        webhook=fields.get("webhook", ""),
        webhook_images="webhook_images" in fields,
        review_of=fields.get("review_of", ""),
        closed=float(fields["closed"]) if "closed" in fields else None,
        listed="listed" in fields,
        paused=fields.get("paused"),
        cancelled="cancelled_at" in fields,
        total=count("total"),
        cursor=count("cursor"),
        parts=count("parts"),
        unrecorded=count("unrecorded"),
        untold=count("untold"),
        done=count("done"),
        failed=count("failed"),
        skipped=count("skipped"),
        cancelled_images=count("cancelled"),
        review=count("review"),
        again=count("again"),
        window=count("window"),
        cancel_cursor=count("cancel_cursor"),
        spills=count("spills"),
        judged_final=count("judged_final"),
        judged_failed=count("judged_failed"),
    )
