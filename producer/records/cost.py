"""Cost of images: worker time and requests to S3 at the prices of the settings. Storage and traffic between regions are
not included."""

from __future__ import annotations

import dataclasses
from typing import Any

from jobs.recipe import Recipe
from jobs.settings import Settings

_OBJECTS_PER_LIST = 1000
_FILES_PER_IMAGE = 3 / 10_000
"""Parts of manifest and report."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """`writes`: PUT and LIST, which S3 prices alike; `reads`: GET and HEAD."""

    worker_hours: float
    writes: int
    reads: int
    worker_usd: float
    s3_usd: float

    @property
    def usd(self) -> float:
        return self.worker_usd + self.s3_usd

    def summary(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self) | {"usd": self.usd}
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in fields.items()}


def estimate_cost(recipe: Recipe, settings: Settings, *, done: int, skipped: int, worker_s: float) -> Cost:
    """Return the cost of images that are, or will be, done: listed, looked up at the destination, read and written."""
    writes = done * (2 + len(recipe.renditions)) + (done + skipped) * (1 / _OBJECTS_PER_LIST + _FILES_PER_IMAGE)
    reads = 2 * done + skipped * (2 + len(recipe.renditions))
    hours = worker_s / 3600
    return Cost(
        worker_hours=hours,
        writes=round(writes),
        reads=reads,
        worker_usd=hours * settings.worker_usd,
        s3_usd=(writes * settings.s3_write_usd + reads * settings.s3_read_usd) / 1000,
    )
