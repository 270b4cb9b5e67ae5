"""What images cost: workers' time and requests to S3, at the prices of the settings. Storage and traffic between
regions are not in it."""

from __future__ import annotations

import dataclasses
from typing import Any

from jobs.recipe import Recipe
from jobs.settings import Settings

_LISTED_AT_ONCE = 1000
_PART_FILES = 3 / 10_000
"""Files of manifest and report an image."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bill:
    """`writes`: PUT and LIST, which S3 charges alike; `reads`: GET and HEAD."""

    worker_hours: float
    writes: int
    reads: int
    worker_usd: float
    s3_usd: float

    @property
    def usd(self) -> float:
        return self.worker_usd + self.s3_usd

    def summary(self) -> dict[str, Any]:
        told = dataclasses.asdict(self) | {"usd": self.usd}
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in told.items()}


def bill(recipe: Recipe, settings: Settings, *, done: int, skipped: int, worker_s: float) -> Bill:
    """Of images that were done, or will be: listed, looked for at the destination, read, written."""
    writes = done * (2 + len(recipe.renditions)) + (done + skipped) * (1 / _LISTED_AT_ONCE + _PART_FILES)
    reads = 2 * done + skipped * (2 + len(recipe.renditions))
    s3_usd = (writes * settings.s3_write_usd + reads * settings.s3_read_usd) / 1000
    hours = worker_s / 3600
    return Bill(
        worker_hours=hours,
        writes=round(writes),
        reads=reads,
        worker_usd=hours * settings.worker_usd,
        s3_usd=s3_usd,
    )
