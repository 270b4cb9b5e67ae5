"""What people see: tables, job summaries, progress on stderr (a bar on a terminal, else a line now and then)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jobs.errors import ServiceUnavailable
from jobs.job import Failure, Job, Tally
from jobs.ledger import Ledger

SILENT_S = 2.0
"""Nothing is shown of what takes less."""
LINE_EVERY_S = 10.0
POLL_S = 0.3
_COUNTS = ("total", "open", "done", "failed", "skipped")


class Counter:
    """Counts something whose end is not known: in place on a terminal, else a line every ten seconds."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._console = Console(stderr=True)
        self._status = self._console.status(f"{what} ...")
        self._next = time.monotonic() + SILENT_S

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def update(self, count: int) -> None:
        if time.monotonic() < self._next:
            return
        text = f"{self._what}: {count:,}"
        if self._console.is_terminal:
            self._status.update(text)
            self._status.start()
        else:
            self._console.print(text, highlight=False)
            self._next = time.monotonic() + LINE_EVERY_S


def wait_for(job_id: str, ledger: Ledger, *, timeout_s: float | None) -> Job:
    """Returns the job when it is closed, or as it is when the time is up. Goes on while Redis is away."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    job = ledger.job(job_id)
    with _Bar() as bar:
        while job.closed is None and (deadline is None or time.monotonic() < deadline):
            bar.show(job)
            time.sleep(POLL_S)
            try:
                job = ledger.job(job_id)
            except ServiceUnavailable as exc:
                bar.say(str(exc))
        return job


def job_lines(job: Job, *, served: bool = True, tally: Tally | None = None) -> Iterator[str]:
    """A job in a few lines. `served`: a running worker has its model. `tally`: of its done images."""
    yield f"job:       {job.id}" + (f"  ({job.name})" if job.name != job.source else "")
    yield f"from, to:  {job.source}  ->  {job.destination}"
    yield f"model:     {job.model}, {job.lane}" + ("" if served else "; no running worker serves it: the job waits")
    doing = "its report is being written" if job.listed and not job.open and job.closed is None else job.paused
    yield f"state:     {job.state}" + (f" ({doing})" if doing else "")
    counts = f"{job.done} done, {job.failed} failed, {job.skipped} skipped, {job.cancelled_images} cancelled"
    yield f"images:  {job.total} = {job.open} open, {counts}" + (f"; {job.review} to review" if job.review else "")
    if tally and tally.review:
        yield "review:    " + ", ".join(f"{count} {reason}" for reason, count in tally.review.items())
    for name, verdicts in tally.rules.items() if tally else ():
        yield f"rules:     {name}: " + ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())


def jobs_table(jobs: Iterable[Job]) -> None:
    """Plain columns: a table that gave way to a narrow terminal would cut the job's id, which people copy."""
    rows = [["job", "state", *_COUNTS, "lane", "model", "name"]]
    for job in jobs:
        counts = [str(getattr(job, column)) for column in _COUNTS]
        rows.append([job.id, str(job.state), *counts, job.lane, job.model, job.name])
    print_columns(rows)


def print_columns(rows: list[list[str]]) -> None:
    """Each column as wide as its widest; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (text.rjust(n) if _is_number(text) else text.ljust(n) for text, n in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def dead_line(failure: Failure) -> str:
    """One dead letter, fields apart by tabs as `status --failed` has them."""
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(failure.at))
    return "\t".join((failure.key, failure.code, str(failure.tries), when, failure.worker, failure.message))


def some(count: int, what: str) -> str:
    """`1 image`, `2,000 images`."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def in_words(seconds: float) -> str:
    """A time, as one would say it."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    days, hours = minutes // 1440, minutes // 60 % 24
    return f"{days} d {hours} h" if days else f"{hours} h {minutes % 60} min" if hours else f"{minutes} min"


class _Bar:
    """A bar on a terminal; else a line every ten seconds, from the second on that takes longer than `SILENT_S`."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not sys.stderr.isatty(),
            transient=True,
        )
        self._task = self._progress.add_task("images", total=None)
        self._next = time.monotonic() + SILENT_S
        self._said = ""

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, job: Job) -> None:
        self._progress.update(self._task, total=job.total, completed=job.final)
        if not self._console.is_terminal and time.monotonic() >= self._next:
            self.say(f"{job.final} of {job.total} final, {job.failed} failed")
            self._next = time.monotonic() + LINE_EVERY_S

    def say(self, text: str) -> None:
        if text != self._said:
            self._console.print(text, highlight=False)
        self._said = text
