"""What a submission would take, before it is made: images and bytes as the source has them now, time and cost from
what this fleet has measured. The source is read as `submit` reads it, and nothing is kept of a row."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

from jobs.ledger import Ledger
from jobs.s3.client import Store
from jobs.settings import Settings
from producer.console.fleet import count_served
from producer.console.output import in_words
from producer.records.cost import Bill, bill
from producer.submission.submit import Request, check_model, rows_of

ASSUMED_RATE = 90.0
"""Images a second of one H100 with BiRefNet at 1024 x 1024, float16, compiled: estimated from its arithmetic (2.5
TFLOP an image, a third of 780 TFLOP/s, less what else an image takes). Nobody has measured it."""
_TOLD_EVERY = 1000
MEASURED_FROM = 100
"""Images that must be done before their time says anything."""
BUSY_SHARE = 0.5
"""Of its slots that a worker must have filled for its rate to be what it can do."""


@dataclasses.dataclass(frozen=True)
class Speed:
    """Images a second of one worker, and where the figure comes from."""

    rate: float
    said_by: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """`unsized`: images whose size the source does not say; `size_bytes` is of the others. `serving`: workers that
    serve the model now; `workers`: those it is planned for."""

    source: str
    model: str
    images: int
    size_bytes: int
    unsized: int
    serving: int
    workers: int
    speed: Speed
    bill: Bill

    @property
    def seconds(self) -> float:
        return self.images / (self.speed.rate * self.workers)

    def summary(self) -> dict[str, Any]:
        """What `--json` shows."""
        told = {name: getattr(self, name) for name in ("source", "model", "images", "unsized", "serving", "workers")}
        told |= {"bytes": self.size_bytes, "images_per_worker_s": self.speed.rate, "rate_from": self.speed.said_by}
        return told | {"seconds": round(self.seconds, 1), "cost": self.bill.summary()}

    def lines(self, settings: Settings) -> list[str]:
        """For people. The last line says what the others come to."""
        unsized = f", without {self.unsized:,} whose size is not known" if self.unsized else ""
        served = f"{self.serving} workers serve it" if self.serving else "no running worker serves it"
        cost = self.bill
        return [
            f"source:    {self.source}",
            f"images:  {self.images:,}, {_size(self.size_bytes)}{unsized}",
            f"model:     {self.model}; {served}, planned for {self.workers}",
            f"speed:     {self.speed.rate:,.2f} images a second and worker ({self.speed.said_by})",
            f"workers:   {cost.worker_hours:,.1f} hours at {settings.worker_usd:g} USD = {cost.worker_usd:,.2f} USD",
            f"S3:        {cost.writes:,} PUT and LIST at {settings.s3_write_usd:g} USD a thousand, {cost.reads:,} GET "
            f"and HEAD at {settings.s3_read_usd:g} = {cost.s3_usd:,.2f} USD",
            f"together:  {in_words(self.seconds)}, {cost.usd:,.2f} USD",
        ]


def plan(
    request: Request,
    settings: Settings,
    *,
    workers: int | None,
    store: Store,
    ledger: Ledger,
    listed: Callable[[int], None],
) -> Plan:
    """`workers`: how many there will be; None: as many as serve the model now, at least one. Raises what `submit`
    raises for a source that can't be listed."""
    check_model(request.recipe.model, ledger)
    images = size_bytes = unsized = 0
    for row in rows_of(request, store):
        images += 1
        size_bytes += max(0, row.size)
        unsized += row.size < 0
        if images % _TOLD_EVERY == 0:
            listed(images)
    model = request.recipe.model
    speed = find_speed(model, ledger)
    serving = count_served(ledger.workers())[model]
    return Plan(
        source=request.source,
        model=model,
        images=images,
        size_bytes=size_bytes,
        unsized=unsized,
        serving=serving,
        workers=workers or max(1, serving),
        speed=speed,
        bill=bill(request.recipe, settings, done=images, skipped=0, worker_s=images / speed.rate),
    )


def has_more_than(count: int, request: Request, store: Store) -> bool:
    """Reads no further than it must."""
    return next(itertools.islice(rows_of(request, store), count, None), None) is not None


def find_speed(model: str, ledger: Ledger) -> Speed:
    """By the newest job of this model that says enough, else by workers that are busy now, else assumed."""
    for job in ledger.jobs():
        if job.model == model and job.done >= MEASURED_FROM:
            worker_s = ledger.tally(job.id).worker_s
            if worker_s:
                return Speed(job.done / worker_s, f"measured in job {job.id}")
    rates = [float(facts["rate"]) for facts in ledger.workers().values() if _is_busy(facts, model)]
    if rates:
        return Speed(sum(rates) / len(rates), f"measured now, mean of {len(rates)} busy workers")
    return Speed(ASSUMED_RATE, "assumed, of an H100 with BiRefNet: run a few hundred images first to measure yours")


def _is_busy(facts: Mapping[str, str], model: str) -> bool:
    if facts["model"] != model or float(facts.get("rate", 0)) <= 0:
        return False
    return int(facts.get("in_flight", 0)) >= BUSY_SHARE * int(facts["slots"])


def _size(count: float) -> str:
    if count < 1000:
        return f"{count:.0f} B"
    power = min(5, int(math.log10(count) // 3))
    return f"{count / 1000**power:.1f} {'kMGTP'[power - 1]}B"
