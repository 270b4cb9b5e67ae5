"""Changes to a job that is under way: tune, retry, cancel, pause, unpause."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from jobs.errors import JobError, SettingsError
from producer.cli.session import open_ledger, open_services

if TYPE_CHECKING:
    from jobs.message import Lane


@click.command()
@click.argument("job")
@click.option("--weight", type=click.IntRange(1, 1000), help="Its share against other jobs'.")
@click.option("--rate", type=click.FloatRange(min=0), metavar="N", help="At most N images a second; 0: no limit.")
@click.option("--lane", type=click.Choice(["live", "backfill"]), help="Live is always taken first.")
def tune(job: str, weight: int | None, rate: float | None, lane: Lane | None) -> None:
    """Change how fast a running job is fed; what is on its queue already is not touched."""
    if weight is None and rate is None and lane is None:
        raise SettingsError("Say what to change: --weight, --rate or --lane.")
    with open_ledger() as (_, ledger):
        ledger.job(job)
        if not ledger.tune(job, weight=weight, rate=rate, lane=lane):
            raise JobError(f"Job {job} is closed: there is nothing left to feed.", code="job_closed")


@click.command()
@click.argument("job")
@click.option("--code", metavar="C", help="Only those that failed with this code.")
def retry(job: str, code: str | None) -> None:
    """Try a job's failed images again, from what their sources are now. A closed job is open again."""
    from producer.console.output import some
    from producer.records import failures as letters

    with open_services() as (_, ledger, store):
        count = letters.retry(ledger.job(job), code, ledger=ledger, store=store)
    click.echo(f"To be tried again: {some(count, 'image')} of {job}.", err=True)


@click.command()
@click.argument("job")
def cancel(job: str) -> None:
    """Cancel a job: images in work end, the others become cancelled. What is done stays."""
    with open_ledger() as (_, ledger):
        ledger.job(job)
        if not ledger.cancel(job):
            raise SettingsError(f"Job {job} is closed already: there is nothing to cancel.", code="job_closed")
    click.echo(f"Nothing more of {job} is begun; `cutfleet wait {job}` ends when its report is written.", err=True)


@click.command()
@click.argument("job")
def pause(job: str) -> None:
    """Pause a job: what is on its queue goes on, nothing more is fed."""
    with open_ledger() as (_, ledger):
        found = ledger.job(job)
        if found.closed is not None or found.cancelled:
            raise SettingsError(f"Job {job} is {found.state}: there is nothing to pause.", code="job_closed")
        ledger.pause(job, "by hand")


@click.command()
@click.argument("job")
def unpause(job: str) -> None:
    """Go on with a paused job."""
    with open_ledger() as (_, ledger):
        ledger.job(job)
        if not ledger.unpause(job):
            raise SettingsError(f"Job {job} is not paused.", code="job_not_paused")


COMMANDS = (tune, retry, cancel, pause, unpause)
