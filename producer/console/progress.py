"""Progress on stderr: updated in place on a terminal, else a line every ten seconds. Nothing for the first two."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jobs.errors import ServiceUnavailable
from jobs.job import Job
from jobs.ledger import Ledger

QUIET_S = 2.0
LINE_EVERY_S = 10.0
POLL_S = 0.3


class Counter:
    """Shows a growing count whose end is unknown."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._console = Console(stderr=True)
        self._status = self._console.status(f"{label} ...")
        self._next_at = time.monotonic() + QUIET_S

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def update(self, count: int) -> None:
        if time.monotonic() < self._next_at:
            return
        text = f"{self._label}: {count:,}"
        if self._console.is_terminal:
            self._status.update(text)
            self._status.start()
        else:
            self._console.print(text, highlight=False)
            self._next_at = time.monotonic() + LINE_EVERY_S


def wait_until_closed(job_id: str, ledger: Ledger, *, timeout_s: float | None) -> Job:
    """Return the job when it is closed, or as it is after `timeout_s`. Keeps waiting while Redis is unavailable."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    job = ledger.jobs.get(job_id)
    with _JobBar() as bar:
        while job.closed is None and (deadline is None or time.monotonic() < deadline):
            bar.update(job)
            time.sleep(POLL_S)
            try:
                job = ledger.jobs.get(job_id)
            except ServiceUnavailable as exc:
                bar.print(str(exc))
        return job


class _JobBar:
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
        self._next_at = time.monotonic() + QUIET_S
        self._last_line = ""

    def __enter__(self) -> _JobBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, job: Job) -> None:
        self._progress.update(self._task, total=job.total, completed=job.final)
        if not self._console.is_terminal and time.monotonic() >= self._next_at:
            self.print(f"{job.final} of {job.total} final, {job.failed} failed")
            self._next_at = time.monotonic() + LINE_EVERY_S

    def print(self, line: str) -> None:
        """Print a line unless it repeats the last one."""
        if line != self._last_line:
            self._console.print(line, highlight=False)
        self._last_line = line
