"""Change a running job: tune, retry, cancel, pause, unpause."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from jobs.errors import JobClosed, SettingsError
from jobs.message import LANES
from producer.cli.session import open_ledger, open_services
from producer.console.output import format_count

if TYPE_CHECKING:
    from jobs.message import Lane


@click.command()
@click.argument("job")
@click.option("--weight", type=click.IntRange(1, 1000), help="Share of the queue against other jobs.")
@click.option("--rate", type=click.FloatRange(min=0), metavar="N", help="Feed at most N images a second; 0: no limit.")
@click.option("--lane", type=click.Choice(LANES), help="Workers take live images first.")
def tune(job: str, weight: int | None, rate: float | None, lane: Lane | None) -> None:
    """Change how fast a running job is fed; images on its queue stay there."""
    if weight is None and rate is None and lane is None:
        raise SettingsError("Nothing to change: give --weight, --rate or --lane.")
    with open_ledger() as (_, ledger):
        ledger.jobs.get(job)
        if not ledger.jobs.tune(job, weight=weight, rate=rate, lane=lane):
            raise JobClosed(f"Job {job} is closed: there is nothing to feed.")


@click.command()
@click.argument("job")
@click.option("--code", metavar="C", help="Only images that failed with this code.")
def retry(job: str, code: str | None) -> None:
    """Retry a job's failed images, in the version that their sources have now. Reopens a closed job."""
    from producer.records.failures import replay

    with open_services() as (_, ledger, store):
        count = replay(ledger.jobs.get(job), code, ledger=ledger, store=store)
    click.echo(f"Reopened {format_count(count, 'failed image')} of job {job}.", err=True)


@click.command()
@click.argument("job")
def cancel(job: str) -> None:
    """Cancel a job: images in work finish, all other open ones become cancelled. Outputs stay."""
    with open_ledger() as (_, ledger):
        ledger.jobs.get(job)
        if not ledger.jobs.cancel(job):
            raise JobClosed(f"Job {job} is closed: there is nothing to cancel.")
    click.echo(f"Job {job} starts no more images; `cutfleet wait {job}` ends when its report is written.", err=True)


@click.command()
@click.argument("job")
def pause(job: str) -> None:
    """Pause a job: images on its queue are finished, no more are fed."""
    with open_ledger() as (_, ledger):
        found = ledger.jobs.get(job)
        if found.closed is not None or found.cancelled:
            raise JobClosed(f"Job {job} is {found.state}: there is nothing to pause.")
        ledger.jobs.pause(job, "by hand")


@click.command()
@click.argument("job")
def unpause(job: str) -> None:
    """Continue a paused job."""
    with open_ledger() as (_, ledger):
        ledger.jobs.get(job)
        if not ledger.jobs.unpause(job):
            raise SettingsError(f"Job {job} is not paused.", code="job_not_paused")


COMMANDS = (tune, retry, cancel, pause, unpause)
