"""Exit codes, connections, and the output that several commands share."""

from __future__ import annotations

import enum
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import click

from jobs.errors import SettingsError
from jobs.message import RENDER_POOL
from producer.console.output import format_count, job_lines

if TYPE_CHECKING:
    from jobs.job import Job
    from jobs.ledger import Ledger
    from jobs.ledger.fleet import Heartbeat
    from jobs.results import JobStats
    from jobs.s3.client import Store
    from jobs.settings import Settings

CONNECTIONS = 24
"""More than a listing's requests at a time."""


class ExitCode(enum.IntEnum):
    OK = 0
    FAILED = 1  # images failed, or `audit` or `doctor` found an error
    USAGE = 2  # wrong usage or settings
    DEADLINE = 3  # `wait --timeout` expired
    UNREACHABLE = 4  # a service is unreachable or refuses access
    INTERRUPTED = 130  # Ctrl-C, as shells report it


@contextmanager
def open_ledger() -> Iterator[tuple[Settings, Ledger]]:
    from jobs.ledger import Ledger
    from jobs.settings import load_settings

    settings = load_settings()
    with Ledger(settings.redis_url, name=settings.redis_name) as ledger:
        yield settings, ledger


@contextmanager
def open_services() -> Iterator[tuple[Settings, Ledger, Store]]:
    from jobs.s3.client import Store

    with open_ledger() as (settings, ledger):
        ledger.ping()
        with Store.of(settings, connections=CONNECTIONS) as store:
            yield settings, ledger, store


def progress(label: str) -> AbstractContextManager[Callable[[int], None]]:
    """Show a count on stderr; call the value with each new count."""
    from producer.console.progress import progress as show_progress

    return show_progress(label)


def stop_event() -> threading.Event:
    """Return an event that SIGTERM and Ctrl-C set."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def check_webhook_options(url: str, images: bool, settings: Settings) -> None:
    """Raises `SettingsError`."""
    from producer.webhooks.delivery import check_webhook

    if url:
        check_webhook(url, settings)
    elif images:
        raise SettingsError("--webhook-images needs a receiver: add --webhook URL.")


def wait_and_summarize(job_id: str, ledger: Ledger, *, timeout_s: float | None = None) -> ExitCode:
    from producer.console.progress import wait_until_closed

    wait_until_closed(job_id, ledger, timeout_s=timeout_s)
    job, stats, workers = ledger.jobs.look(job_id)
    print_job(job, stats, workers, err=True)
    if job.closed is None:
        click.echo(f"cutfleet: still {format_count(job.open, 'image')} open after {timeout_s:g} s [deadline]", err=True)
        return ExitCode.DEADLINE
    return ExitCode.FAILED if job.failed else ExitCode.OK


def print_job(job: Job, stats: JobStats, workers: Mapping[str, Heartbeat], *, err: bool = False) -> None:
    for line in job_lines(job, is_served=job.closed is not None or _is_served(job, workers), stats=stats):
        click.echo(line, err=err)


def warn_if_unserved(job: Job, ledger: Ledger) -> None:
    if not _is_served(job, ledger.fleet.workers()):
        needed = "is on a CPU" if job.model == RENDER_POOL else f"serves model {job.model!r}"
        click.echo(f"No running worker {needed}: the job waits until one does.", err=True)


def _is_served(job: Job, workers: Mapping[str, Heartbeat]) -> bool:
    from jobs.ledger.fleet import count_workers

    return job.model in count_workers(workers)
