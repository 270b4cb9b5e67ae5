"""The live screen of `cutfleet status JOB --watch`: how far a job is, how fast, how long still, and what is amiss. A
look costs the same at any size: counts stand in the ledger, and it holds some ten thousand failures of a job at most.
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

from jobs.broker import worker_queues
from jobs.errors import ServiceUnavailable
from jobs.job import Job
from jobs.ledger import Ledger, Survey
from producer.console.output import in_words, job_lines

LOOK_S = 1.0
PACE_S = 300.0
"""Rate and remaining time follow from the last minutes: a job that stood still all night is not slow now."""


class Pace:
    """How fast a job goes, from looks at it over the last `PACE_S`."""

    def __init__(self) -> None:
        self._looks: collections.deque[tuple[float, int]] = collections.deque()

    def look(self, now: float, final: int) -> None:
        self._looks.append((now, final))
        while self._looks[0][0] < now - PACE_S:
            self._looks.popleft()

    @property
    def rate(self) -> float | None:
        """Images a second; None before the second look."""
        (first, before), (last, after) = self._looks[0], self._looks[-1]
        return (after - before) / (last - first) if last > first else None

    def remaining_s(self, left: int) -> float | None:
        """None while nothing moves."""
        return left / self.rate if self.rate and self.rate > 0 else None


class Codes:
    """Failures by code, counted anew only when there are others."""

    def __init__(self) -> None:
        self._failed = 0
        self._counts: collections.Counter[str] = collections.Counter()

    def of(self, job: Job, ledger: Ledger) -> Mapping[str, int]:
        """Of those that the ledger holds; beyond some ten thousand they stand in S3: `cutfleet dead`."""
        if job.failed != self._failed:
            self._failed = job.failed
            self._counts = collections.Counter(failure.code for _, failure in ledger.failures(job.id))
        return self._counts


def watch_job(job_id: str, ledger: Ledger, *, console: Console) -> Job:
    """Until the job is closed; goes on while Redis is away."""
    pace, codes = Pace(), Codes()
    with Live(console=console, auto_refresh=False) as live:
        while True:
            try:
                job, _, workers = ledger.look(job_id)
                pace.look(time.monotonic(), job.final)
                survey = ledger.survey(worker_queues(job.model))
                live.update(screen(job, pace, survey, workers, codes.of(job, ledger)), refresh=True)
                if job.closed is not None:
                    return job
            except ServiceUnavailable as exc:
                live.update(Text(str(exc), style="red"), refresh=True)
            time.sleep(LOOK_S)


def screen(
    job: Job, pace: Pace, survey: Survey, workers: Mapping[str, Mapping[str, str]], codes: Mapping[str, int]
) -> Group:
    lines = [Text(line) for line in job_lines(job)]
    left = pace.remaining_s(job.open)
    speed = "not known yet" if pace.rate is None else f"{pace.rate:,.1f} a second"
    if job.closed is None:
        ends = "" if left is None else f", {in_words(left)} left" + ("" if job.listed else " for what is listed so far")
        lines.append(Text(f"rate:      {speed}{ends}"))
        lengths = (f"{count} on {queue}" for queue, (count, _) in survey.queues.items() if count)
        lines.append(Text("queues:    " + (", ".join(lengths) or "empty") + f"; {survey.leased} held by workers"))
    if codes:
        found = sorted(codes.items(), key=lambda pair: -pair[1])
        text = "failures:  " + ", ".join(f"{count:,} {code}" for code, count in found)
        held = sum(codes.values())
        lines.append(Text(text if held >= job.failed else f"{text}, of {held:,} here; all: cutfleet dead {job.id}"))
    return Group(ProgressBar(total=max(1, job.total), completed=job.final), *lines, _workers(workers, job.model))


def _workers(workers: Mapping[str, Mapping[str, str]], model: str) -> Table:
    table = Table("worker", "in flight", "images", "a second", box=None, pad_edge=False)
    for node, facts in workers.items():
        if facts["model"] == model:
            told = [facts.get(name, "") for name in ("in_flight", "images", "rate")]
            table.add_row(node, *told)
    return table
