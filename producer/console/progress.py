"""Progress on stderr: updated in place on a terminal, else a line every ten seconds. Nothing for the first two."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jobs.errors import ServiceUnavailable
from jobs.job import Job
from jobs.ledger import Ledger

QUIET_S = 2.0
LINE_EVERY_S = 10.0
POLL_S = 0.3


@contextmanager
def progress(label: str) -> Iterator[Callable[[int], None]]:
    """Show a growing count whose end is unknown; call the value with each new count."""
    console = Console(stderr=True)
    status = console.status(f"{label} ...")
    next_at = time.monotonic() + QUIET_S

    def update(count: int) -> None:
        nonlocal next_at
        if time.monotonic() < next_at:
            return
        text = f"{label}: {count:,}"
        if console.is_terminal:
            status.update(text)
            status.start()
        else:
            console.print(text, highlight=False)
            next_at = time.monotonic() + LINE_EVERY_S

    try:
        yield update
    finally:
        status.stop()


def wait_until_closed(job_id: str, ledger: Ledger, *, timeout_s: float | None) -> Job:
    """Return the job when it is closed, or as it is after `timeout_s`. Keeps waiting while Redis is unavailable."""
    began = time.monotonic()
    deadline = math.inf if timeout_s is None else began + timeout_s
    next_at, last_line = began + QUIET_S, ""
    console = Console(stderr=True)

    def print_once(line: str) -> None:
        nonlocal last_line
        if line != last_line:
            console.print(line, highlight=False)
        last_line = line

    job = ledger.jobs.get(job_id)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("images", total=None)
        while job.closed is None and time.monotonic() < deadline:
            bar.update(task, total=job.total, completed=job.final)
            if not console.is_terminal and time.monotonic() >= next_at:
                print_once(f"{job.final} of {job.total} final, {job.failed} failed")
                next_at = time.monotonic() + LINE_EVERY_S
            time.sleep(POLL_S)
            try:
                job = ledger.jobs.get(job_id)
            except ServiceUnavailable as exc:
                print_once(str(exc))
    return job
