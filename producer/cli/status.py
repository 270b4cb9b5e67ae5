"""What became of jobs and images: status, jobs, wait, dead, review."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jobs.errors import SettingsError
from producer.cli.session import open_ledger, open_services, show_job, tell_unserved, wait_until_closed

if TYPE_CHECKING:
    from jobs.job import Failure, Job
    from jobs.ledger import Ledger


@click.command()
@click.argument("what", metavar="JOB|s3://BUCKET/KEY")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--failed", is_flag=True, help="List the images that failed: key, code, reason.")
@click.option("--flagged", is_flag=True, help="List the images to look at: key, why, rules that were not passed.")
@click.option("--watch", "live", is_flag=True, help="A live screen until the job is closed.")
def status(what: str, as_json: bool, failed: bool, flagged: bool, live: bool) -> None:
    """What became of a job, or of one source image."""
    from dataclasses import asdict

    if live and (as_json or failed or flagged or what.startswith("s3://")):
        raise SettingsError("--watch shows a job, and goes with no other option.")
    if what.startswith("s3://"):
        _image_status(what, as_json)
        return
    if live:
        _watch_job(what)
        return
    with open_ledger() as (_, ledger):
        job, tally, workers = ledger.look(what)
        failures = _failures(job, ledger) if failed else []
        remarks = list(ledger.remarks(what).values()) if flagged else []
        if as_json:
            rows = [{"key": f.key, "code": f.code, "message": f.message, "tries": f.tries} for _, f in failures]
            told = job.summary() | {"tally": asdict(tally)} | ({"failures": rows} if failed else {})
            told |= {"flagged": [json.loads(remark.to_json()) for remark in remarks]} if flagged else {}
            click.echo(json.dumps(told, ensure_ascii=False))
            return
        if not failed and not flagged:
            show_job(job, tally, workers)
        for _, failure in failures:
            click.echo(f"{failure.key}\t{failure.code}\t{failure.message}")
        for remark in remarks:
            click.echo(f"{remark.key}\t{','.join(remark.review)}\t{'; '.join(remark.complaints())}")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For programs: one object a line.")
def jobs(as_json: bool) -> None:
    """The newest jobs."""
    from producer.console.output import jobs_table

    with open_ledger() as (_, ledger):
        found = ledger.jobs()
        if as_json:
            for job in found:
                click.echo(json.dumps(job.summary(), ensure_ascii=False))
            return
        jobs_table(found)


@click.command()
@click.argument("job")
@click.option("--timeout", "timeout_s", type=float, metavar="S", help="Give up after S seconds (exit code 3).")
def wait(job: str, timeout_s: float | None) -> None:
    """Wait until a job is closed: exit code 0 when all is done, 1 when some images failed."""
    with open_ledger() as (_, ledger):
        ledger.job(job)
        sys.exit(wait_until_closed(job, ledger, timeout_s=timeout_s))


@click.command()
@click.argument("job")
@click.option("--flagged", is_flag=True, help="What its recipe or its rules flag.")
@click.option("--failed", is_flag=True, help="What failed.  [default: both]")
@click.option("--sample", type=click.IntRange(min=1), metavar="N", help="N more, drawn at random of all cutouts.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=".", show_default=True)
def review(job: str, flagged: bool, failed: bool, sample: int | None, out: Path) -> None:
    """Make a page to look at a job's images: before and after, the worst edge at 100 %, figures, reasons; approve and
    reject. Any CPU worker makes the previews. Prints the page's path."""
    from producer.review.select import Wanted, write_review

    unsaid = not (flagged or failed or sample)
    wanted = Wanted(flagged=flagged or unsaid, failed=failed or unsaid, sample=sample or 0)
    with open_services() as (settings, ledger, store):

        def asked(made: Job) -> None:
            click.echo(f"{made.total} previews are made by job {made.id}", err=True)
            tell_unserved(made, ledger)

        page = write_review(
            ledger.job(job), wanted, out, store=store, ledger=ledger, lease_s=settings.lease_s, asked=asked
        )
    click.echo(page)


@click.command()
@click.argument("job")
@click.option("--json", "as_json", is_flag=True, help="For programs: one object a line.")
def dead(job: str, as_json: bool) -> None:
    """The dead letters of a job: every image that failed, its code, tries, time, worker and reason."""
    from producer.console.output import dead_line
    from producer.records.failures import failures_of, json_row

    with open_services() as (_, ledger, store):
        for index, failure in failures_of(ledger.job(job), ledger=ledger, store=store):
            click.echo(json_row(index, failure) if as_json else dead_line(failure))


def _failures(job: Job, ledger: Ledger) -> list[tuple[int, Failure]]:
    """In order of index. The store is asked only for what the ledger no longer holds."""
    if not job.spills:
        return sorted(ledger.failures(job.id), key=lambda pair: pair[0])
    from producer.records.failures import failures_of

    with open_services() as (_, _, store):
        return sorted(failures_of(job, ledger=ledger, store=store), key=lambda pair: pair[0])


def _watch_job(job: str) -> None:
    from rich.console import Console

    from producer.console.live_view import watch_job

    with open_ledger() as (_, ledger):
        ledger.job(job)
        watch_job(job, ledger, console=Console())


def _image_status(uri: str, as_json: bool) -> None:
    from jobs.s3.client import Location
    from producer.records.report import image_status

    with open_services() as (_, ledger, store):
        found = image_status(Location.parse(uri), ledger=ledger, store=store)
    if as_json:
        click.echo(json.dumps(found.summary(), ensure_ascii=False))
        return
    for name, value in found.summary().items():
        click.echo(f"{name + ':':9} {value}")


COMMANDS = (status, jobs, wait, dead, review)
