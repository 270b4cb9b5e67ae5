"""Results of images: why one failed, quality figures and rule results of one that is done, and their sums for a job."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Iterable, Mapping
from typing import Any

_PER_UNIT = 10_000
"""Redis counts integers: sums of figures keep four decimal places."""


class Verdict(enum.StrEnum):
    """Result of one rule."""

    PASS = "pass"  # noqa: S105  (no password)
    WARN = "warn"
    FAIL = "fail"


Rules = tuple[tuple[str, str, str, str], ...]
"""Rule, verdict, value, limit: as text, since they are stored as JSON."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why an image is `failed`. `at`: Unix time."""

    key: str
    code: str
    message: str
    tries: int
    at: float
    worker: str

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Failure:
        """Ignore fields of a later version."""
        return cls(**{field.name: fields[field.name] for field in dataclasses.fields(cls)})

    @classmethod
    def from_json(cls, text: str) -> Failure:
        return cls.from_fields(json.loads(text))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)


@dataclasses.dataclass(frozen=True)
class ImageNote:
    """Quality figures and rule results of a done image. `review`: reasons for a review. `figures`: of its mask.
    `rules`: results by rendition."""

    key: str
    review: tuple[str, ...] = ()
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)
    rules: Mapping[str, Rules] = dataclasses.field(default_factory=dict)

    @property
    def is_notable(self) -> bool:
        """Whether it is stored for people to read; any other note only counts in the job's stats."""
        return bool(self.review) or any(worst_verdict(results) is not Verdict.PASS for results in self.rules.values())

    def counts(self) -> dict[str, int]:
        """Return what it adds to its job's stats: `review REASON`, `rules RENDITION VERDICT`, and sums of figures."""
        counts = {f"review {reason}": 1 for reason in self.review}
        counts |= {f"rules {name} {worst_verdict(results)}": 1 for name, results in self.rules.items()}
        if self.figures:
            counts["measured"] = 1
        return counts | {f"sum {name}": round(value * _PER_UNIT) for name, value in self.figures.items()}

    def unmet_rules(self) -> list[str]:
        """Describe each rule that did not pass."""
        return [
            f"{name}: {rule} {value} ({verdict}" + (f", {limit})" if limit else ")")
            for name, results in self.rules.items()
            for rule, verdict, value, limit in results
            if verdict != Verdict.PASS
        ]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, separators=(",", ":"))


def worst_verdict(results: Iterable[tuple[str, str, str, str]]) -> Verdict:
    verdicts = {verdict for _, verdict, _, _ in results}
    return next((verdict for verdict in (Verdict.FAIL, Verdict.WARN) if verdict in verdicts), Verdict.PASS)


@dataclasses.dataclass(frozen=True)
class Usage:
    """Worker time of an image, and the fingerprint that made it. `fingerprint`: of the recipe with the worker's model;
    empty if unknown. `worker_s`: the image's share of its worker's time."""

    fingerprint: str
    worker_s: float

    def counts(self) -> dict[str, int]:
        counts = {"worker_ms": round(1000 * self.worker_s)} if self.worker_s else {}
        return counts | ({f"made {self.fingerprint}": 1} if self.fingerprint else {})


@dataclasses.dataclass(frozen=True)
class JobStats:
    """Sums over a job's images: images by review reason; verdicts by rendition; mean of each mask figure; worker time
    of done images; images by the fingerprint that made or found them."""

    review: Mapping[str, int]
    rules: Mapping[str, Mapping[str, int]]
    quality: Mapping[str, float]
    worker_s: float
    made: Mapping[str, int]

    @classmethod
    def from_counts(cls, counts: Mapping[str, int]) -> JobStats:
        """`counts`: sums of `ImageNote.counts` and `Usage.counts`."""
        review: dict[str, int] = {}
        rules: dict[str, dict[str, int]] = {}
        quality: dict[str, float] = {}
        made: dict[str, int] = {}
        for name, count in sorted(counts.items()):
            match name.split(" "):
                case ["review", reason]:
                    review[reason] = count
                case ["rules", rendition, verdict]:
                    rules.setdefault(rendition, {})[verdict] = count
                case ["sum", figure]:
                    quality[figure] = round(count / _PER_UNIT / counts["measured"], 4)
                case ["made", fingerprint]:
                    made[fingerprint] = count
        return cls(review, rules, quality, counts.get("worker_ms", 0) / 1000, made)
