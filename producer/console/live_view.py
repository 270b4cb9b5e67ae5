"""Live view of a job, for `cutfleet status JOB --watch`: progress, rate, time left, queues, failures and workers.

A refresh costs the same for a job of any size: the ledger has the counts, and at most some ten thousand failures.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jobs.errors import ServiceUnavailable
from jobs.job import Job
from jobs.ledger import Ledger
from jobs.ledger.fleet import Heartbeat
from jobs.ledger.window import Survey
from jobs.message import worker_queues
from jobs.sliding_rate import SlidingRate
from producer.console.output import format_duration, job_lines

REFRESH_S = 1.0
RATE_WINDOW_S = 300.0
"""Rate and time left come from the last minutes: a job that was paused all night is not slow now."""


class FailureCounts:
    """Failures of a job by code; read again only after new ones."""

    def __init__(self) -> None:
        self._failed = 0
        self._counts: collections.Counter[str] = collections.Counter()

    def read(self, job: Job, ledger: Ledger) -> Mapping[str, int]:
        """Count the failures in the ledger; the others are in S3: `cutfleet dead`."""
        if job.failed != self._failed:
            self._failed = job.failed
            self._counts = collections.Counter(failure.code for _, failure in ledger.images.failures(job.id))
        return self._counts


def watch_job(job_id: str, ledger: Ledger, *, console: Console) -> Job:
    """Show the job until it is closed. Keeps trying while Redis is unavailable."""
    rate, failure_counts = SlidingRate(RATE_WINDOW_S), FailureCounts()
    with Live(console=console, auto_refresh=False) as live:
        while True:
            try:
                job, _, workers = ledger.jobs.look(job_id)
                rate.add(job.final, now=time.monotonic())
                survey = ledger.window.survey(worker_queues(job.model))
                failures = failure_counts.read(job, ledger)
                live.update(render_view(job, rate.per_second, survey, workers, failures), refresh=True)
                if job.closed is not None:
                    return job
            except ServiceUnavailable as exc:
                live.update(Text(str(exc), style="red"), refresh=True)
            time.sleep(REFRESH_S)


def render_view(
    job: Job, rate: float | None, survey: Survey, workers: Mapping[str, Heartbeat], failures: Mapping[str, int]
) -> Group:
    """`rate`: final images per second, None if unknown. `failures`: counts by code."""
    lines = [*job_lines(job)]
    if job.closed is None:
        lengths = [f"{count} on {queue}" for queue, (count, _) in survey.queues.items() if count]
        queues_line = "queues:    " + (", ".join(lengths) or "empty") + f"; {survey.leased} leased by workers"
        lines += [_rate_line(job, rate), queues_line]
    if failures:
        lines.append(_failures_line(job, failures))
    bar = ProgressBar(total=max(1, job.total), completed=job.final)
    table = Table("worker", "in flight", "images", "a second", box=None, pad_edge=False)
    for node, beat in workers.items():
        if beat["model"] == job.model:
            table.add_row(node, *(beat.get(name, "") for name in ("in_flight", "images", "rate")))
    return Group(bar, *map(Text, lines), table)


def _rate_line(job: Job, rate: float | None) -> str:
    if rate is None:
        return "rate:      not known yet"
    left = "" if rate <= 0 else f", {format_duration(job.open / rate)} left"
    if left and not job.listed:
        left += " for what is listed so far"
    return f"rate:      {rate:,.1f} a second{left}"


def _failures_line(job: Job, failures: Mapping[str, int]) -> str:
    ranked = sorted(failures.items(), key=lambda pair: -pair[1])
    line = "failures:  " + ", ".join(f"{count:,} {code}" for code, count in ranked)
    counted = sum(failures.values())
    return line if counted >= job.failed else f"{line}, of {counted:,} here; all: cutfleet dead {job.id}"
