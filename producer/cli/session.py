"""What commands share: exit codes, settings with ledger and store, progress, waiting for a job, the signal to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from jobs.errors import SettingsError

if TYPE_CHECKING:
    import threading

    from jobs.job import Job, Tally
    from jobs.ledger import Ledger
    from jobs.s3.client import Store
    from jobs.settings import Settings

ALL_DONE, SOME_FAILED, USAGE, DEADLINE, UNREACHABLE = range(5)
WRONG = SOME_FAILED
CONNECTIONS = 24
"""More than a listing has requests at a time."""


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


@contextmanager
def progress(what: str) -> Iterator[Callable[[int], None]]:
    from producer.console.output import Counter

    with Counter(what) as counter:
        yield counter.update


def told_to_stop() -> threading.Event:
    """Set by SIGTERM and Ctrl-C."""
    import signal
    import threading

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def check_webhook(url: str, images: bool, settings: Settings) -> None:
    from producer.webhooks.delivery import check_webhook as check

    if url:
        check(url, settings)
    elif images:
        raise SettingsError("Say whom to tell of the images: --webhook URL.")


def wait_until_closed(job_id: str, ledger: Ledger, *, timeout_s: float | None) -> int:
    """The exit code."""
    from producer.console.output import some, wait_for

    wait_for(job_id, ledger, timeout_s=timeout_s)
    job, tally, workers = ledger.look(job_id)
    show_job(job, tally, workers, err=True)
    if job.closed is None:
        click.echo(f"cutfleet: still {some(job.open, 'image')} open after {timeout_s:g} s [deadline]", err=True)
        return DEADLINE
    return SOME_FAILED if job.failed else ALL_DONE


def show_job(job: Job, tally: Tally, workers: Mapping[str, Mapping[str, str]], *, err: bool = False) -> None:
    from producer.console.output import job_lines

    for line in job_lines(job, served=job.closed is not None or is_served(job, workers), tally=tally):
        click.echo(line, err=err)


def tell_unserved(job: Job, ledger: Ledger) -> None:
    from jobs.catalogue import RENDER

    if not is_served(job, ledger.workers()):
        wanted = "is on a CPU" if job.model == RENDER else f"serves model {job.model!r}"
        click.echo(f"No running worker {wanted}: the job waits until one does.", err=True)


def is_served(job: Job, workers: Mapping[str, Mapping[str, str]]) -> bool:
    from producer.console.fleet import count_served

    return job.model in count_served(workers)
