"""Text for people: summaries of jobs and estimates, tables, quantities."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the commands import this module; the types need pydantic
    from jobs.job import Job
    from jobs.results import Failure, JobStats
    from jobs.settings import Settings
    from producer.submission.estimate import Estimate

_COUNTS = ("total", "open", "done", "failed", "skipped")


def job_lines(job: Job, *, is_served: bool = True, stats: JobStats | None = None) -> Iterator[str]:
    """Summarize a job. `is_served`: whether a running worker serves its model."""
    yield f"job:       {job.id}" + (f"  ({job.name})" if job.name != str(job.source) else "")
    yield f"from, to:  {job.source}  ->  {job.destination}"
    yield f"model:     {job.model}, {job.lane}" + ("" if is_served else "; no running worker serves it: the job waits")
    is_reporting = job.listed and not job.open and job.closed is None
    detail = "its report is being written" if is_reporting else job.paused
    yield f"state:     {job.state}" + (f" ({detail})" if detail else "")
    counts = f"{job.done} done, {job.failed} failed, {job.skipped} skipped, {job.cancelled_images} cancelled"
    yield f"images:    {job.total} = {job.open} open, {counts}" + (f"; {job.review} to review" if job.review else "")
    if stats is None:
        return
    if stats.review:
        yield "review:    " + ", ".join(f"{count} {reason}" for reason, count in stats.review.items())
    for name, verdicts in stats.rules.items():
        yield f"rules:     {name}: " + ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())


def estimate_lines(estimate: Estimate, settings: Settings) -> Iterator[str]:
    """Describe an estimate; the last line is its total."""
    cost = estimate.cost
    unsized = f", without {estimate.unsized:,} of unknown size" if estimate.unsized else ""
    served = f"{estimate.serving} workers serve it" if estimate.serving else "no running worker serves it"
    yield f"source:    {estimate.source}"
    yield f"images:    {estimate.images:,}, {format_bytes(estimate.size_bytes)}{unsized}"
    yield f"model:     {estimate.model}; {served}, estimated for {estimate.workers}"
    yield f"speed:     {estimate.speed.rate:,.2f} images a second and worker ({estimate.speed.origin})"
    yield f"workers:   {cost.worker_hours:,.1f} hours at {settings.worker_usd:g} USD = {cost.worker_usd:,.2f} USD"
    yield (
        f"S3:        {cost.writes:,} PUT and LIST at {settings.s3_write_usd:g} USD a thousand, {cost.reads:,} GET "
        f"and HEAD at {settings.s3_read_usd:g} = {cost.s3_usd:,.2f} USD"
    )
    yield f"total:     {format_duration(estimate.seconds)}, {cost.usd:,.2f} USD"


def failure_line(failure: Failure) -> str:
    """Return key, code, tries, time, worker and message, separated by tabs."""
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(failure.at))
    return "\t".join((failure.key, failure.code, str(failure.tries), when, failure.worker, failure.message))


def print_jobs(jobs: Iterable[Job]) -> None:
    rows = [["job", "state", *_COUNTS, "lane", "model", "name"]]
    for job in jobs:
        counts = [str(getattr(job, column)) for column in _COUNTS]
        rows.append([job.id, str(job.state), *counts, job.lane, job.model, job.name])
    print_columns(rows)


def print_columns(rows: list[list[str]]) -> None:
    """Print rows as aligned columns, numbers to the right. Never narrower than the text: people copy ids and keys."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = []
        for text, width in zip(row, widths, strict=True):
            is_number = text.replace(".", "", 1).isdigit()
            cells.append(text.rjust(width) if is_number else text.ljust(width))
        print("  ".join(cells).rstrip())


def format_count(count: int, noun: str) -> str:
    """Return `1 image`, `2,000 images`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def format_duration(seconds: float) -> str:
    """Return `40 s`, `5 min`, `3 h 20 min` or `2 d 4 h`."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    days, hours = minutes // 1440, minutes // 60 % 24
    return f"{days} d {hours} h" if days else f"{hours} h {minutes % 60} min" if hours else f"{minutes} min"


def format_bytes(count: int) -> str:
    """Return `999 B`, `5.0 kB`, `1.2 TB`."""
    if count < 1000:
        return f"{count} B"
    power = min(5, int(math.log10(count) // 3))
    return f"{count / 1000**power:.1f} {'kMGTP'[power - 1]}B"
