"""Estimates time and cost of a submission before it is made: images and bytes as the source has them now, speed as this
fleet measured it. Reads the source as `submit` does, and keeps nothing of a row."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from jobs.ledger import Ledger
from jobs.ledger.fleet import count_workers
from jobs.s3.client import Store
from jobs.settings import Settings
from producer.records.cost import Cost, estimate_cost
from producer.submission.request import Request
from producer.submission.sources import read_rows
from producer.submission.validation import check_model

ASSUMED_RATE = 90.0
"""Images per second of one H100 with BiRefNet at 1024 x 1024, float16, compiled: calculated (2.5 TFLOP per image, a
third of 780 TFLOP/s, minus everything else that an image takes), not measured."""
_REPORT_EVERY = 1000
MIN_MEASURED = 100
"""Done images that a job needs for its speed to count."""
BUSY_SHARE = 0.5
"""A worker's rate counts if at least this share of its slots is in use."""


@dataclasses.dataclass(frozen=True)
class Speed:
    """`rate`: images per second of one worker. `origin`: where the figure comes from."""

    rate: float
    origin: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """`unsized`: images whose size the source does not give; `size_bytes` is of the others. `serving`: workers that
    serve the model now; `workers`: those the estimate assumes."""

    source: str
    model: str
    images: int
    size_bytes: int
    unsized: int
    serving: int
    workers: int
    speed: Speed
    cost: Cost

    @property
    def seconds(self) -> float:
        return self.images / (self.speed.rate * self.workers)

    def summary(self) -> dict[str, Any]:
        """Return what `--json` shows."""
        names = ("source", "model", "images", "unsized", "serving", "workers")
        fields = {name: getattr(self, name) for name in names}
        fields |= {"bytes": self.size_bytes, "images_per_worker_s": self.speed.rate, "rate_from": self.speed.origin}
        return fields | {"seconds": round(self.seconds, 1), "cost": self.cost.summary()}


def estimate(
    request: Request,
    settings: Settings,
    *,
    workers: int | None,
    store: Store,
    ledger: Ledger,
    listed: Callable[[int], None],
) -> Estimate:
    """`workers`: None: as many as serve the model now, at least one. `listed`: called with the number of images so far.
    Raises what `submit` raises for an unknown model, or a source that can't be listed."""
    model = request.recipe.model
    check_model(model, ledger)
    images = size_bytes = unsized = 0
    for row in read_rows(request, store):
        images += 1
        size_bytes += max(0, row.size)
        unsized += row.size < 0
        if images % _REPORT_EVERY == 0:
            listed(images)
    speed = find_speed(model, ledger)
    serving = count_workers(ledger.fleet.workers())[model]
    return Estimate(
        source=str(request.source),
        model=model,
        images=images,
        size_bytes=size_bytes,
        unsized=unsized,
        serving=serving,
        workers=workers or max(1, serving),
        speed=speed,
        cost=estimate_cost(request.recipe, settings, done=images, skipped=0, worker_s=images / speed.rate),
    )


def has_more_than(count: int, request: Request, store: Store) -> bool:
    """Whether a request has more than `count` images. Lists no further than needed."""
    return next(itertools.islice(read_rows(request, store), count, None), None) is not None


def find_speed(model: str, ledger: Ledger) -> Speed:
    """Return the speed of the newest job of this model with enough images, else of workers that are busy now, else an
    assumption."""
    for job in ledger.jobs.newest():
        if job.model == model and job.done >= MIN_MEASURED:
            worker_s = ledger.jobs.stats(job.id).worker_s
            if worker_s:
                return Speed(job.done / worker_s, f"measured in job {job.id}")
    rates = [float(beat["rate"]) for beat in ledger.fleet.workers().values() if _is_busy(beat, model)]
    if rates:
        return Speed(sum(rates) / len(rates), f"measured now, mean of {len(rates)} busy workers")
    return Speed(ASSUMED_RATE, "assumed, of an H100 with BiRefNet: run a few hundred images first to measure yours")


def _is_busy(beat: Mapping[str, str], model: str) -> bool:
    if beat["model"] != model or float(beat.get("rate", 0)) <= 0:
        return False
    return int(beat.get("in_flight", 0)) >= BUSY_SHARE * int(beat["slots"])
