"""Show the state of jobs, images and the fleet: status, jobs, wait, dead, review, workers, doctor."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jobs.errors import SettingsError
from jobs.s3.location import Location, is_s3_uri
from producer.cli.options import PREFIX, destination_option
from producer.cli.session import ExitCode, open_ledger, open_services, print_job, wait_and_summarize, warn_if_unserved
from producer.console.output import failure_line, print_jobs

if TYPE_CHECKING:
    from jobs.job import Job
    from jobs.ledger import Ledger
    from jobs.results import Failure

_NEWEST = "  [default: the newest open job's]"
_FAILURE_FIELDS = ("key", "code", "message", "tries")


@click.command()
@click.argument("what", metavar="JOB|s3://BUCKET/KEY")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--failed", is_flag=True, help="List the failed images: key, code, message.")
@click.option("--flagged", is_flag=True, help="List the images flagged for review: key, reasons, unmet rules.")
@click.option("--watch", "live", is_flag=True, help="Show a live view until the job is closed.")
def status(what: str, as_json: bool, failed: bool, flagged: bool, live: bool) -> None:
    """Show the status of a job, or of one source image."""
    if live and (as_json or failed or flagged or is_s3_uri(what)):
        raise SettingsError("--watch takes a job and no other option.")
    if live:
        _watch_job(what)
    elif is_s3_uri(what):
        _show_image(Location.parse(what), as_json=as_json)
    else:
        _show_job(what, as_json=as_json, failed=failed, flagged=flagged)


def _watch_job(job_id: str) -> None:
    from rich.console import Console

    from producer.console.live_view import watch_job

    with open_ledger() as (_, ledger):
        ledger.jobs.get(job_id)
        watch_job(job_id, ledger, console=Console())


def _show_image(source: Location, *, as_json: bool) -> None:
    from producer.records.image_status import find_image_status

    with open_services() as (_, ledger, store):
        fields = find_image_status(source, ledger=ledger, store=store).summary()
    if as_json:
        click.echo(json.dumps(fields, ensure_ascii=False))
        return
    for name, value in fields.items():
        click.echo(f"{name + ':':9} {value}")


def _show_job(job_id: str, *, as_json: bool, failed: bool, flagged: bool) -> None:
    with open_ledger() as (_, ledger):
        job, stats, workers = ledger.jobs.look(job_id)
        failures = _read_failures(job, ledger) if failed else []
        notes = list(ledger.images.notes(job_id).values()) if flagged else []
    if as_json:
        fields = job.summary() | {"tally": dataclasses.asdict(stats)}
        if failed:
            fields["failures"] = [{name: getattr(failure, name) for name in _FAILURE_FIELDS} for failure in failures]
        if flagged:
            fields["flagged"] = [dataclasses.asdict(note) for note in notes]
        click.echo(json.dumps(fields, ensure_ascii=False))
        return
    if not failed and not flagged:
        print_job(job, stats, workers)
    for failure in failures:
        click.echo(f"{failure.key}\t{failure.code}\t{failure.message}")
    for note in notes:
        click.echo(f"{note.key}\t{','.join(note.review)}\t{'; '.join(note.unmet_rules())}")


def _read_failures(job: Job, ledger: Ledger) -> list[Failure]:
    """In order of index. Opens the store only when some are no longer in the ledger."""
    if not job.spills:
        rows = dict(ledger.images.failures(job.id))
    else:
        from producer.records.failures import all_failures

        with open_services() as (_, _, store):
            rows = dict(all_failures(job, ledger=ledger, store=store))
    return [failure for _, failure in sorted(rows.items())]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
def jobs(as_json: bool) -> None:
    """List the newest jobs."""
    with open_ledger() as (_, ledger):
        newest = ledger.jobs.newest()
    if as_json:
        for job in newest:
            click.echo(json.dumps(job.summary(), ensure_ascii=False))
    else:
        print_jobs(newest)


@click.command()
@click.argument("job")
@click.option("--timeout", "timeout_s", type=float, metavar="S", help="Stop waiting after S seconds (exit code 3).")
def wait(job: str, timeout_s: float | None) -> None:
    """Wait until a job is closed: exit code 0 without failures, 1 with failures."""
    with open_ledger() as (_, ledger):
        ledger.jobs.get(job)
        sys.exit(wait_and_summarize(job, ledger, timeout_s=timeout_s))


@click.command()
@click.argument("job")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
def dead(job: str, as_json: bool) -> None:
    """List the dead letters of a job: for each failed image its key, code, attempts, time, worker and message."""
    from producer.records.failures import all_failures, json_row

    with open_services() as (_, ledger, store):
        for index, failure in all_failures(ledger.jobs.get(job), ledger=ledger, store=store):
            click.echo(json_row(index, failure) if as_json else failure_line(failure))


@click.command()
@click.argument("job")
@click.option("--flagged", is_flag=True, help="Include images that the recipe's thresholds or rules flag.")
@click.option("--failed", is_flag=True, help="Include images that failed.  [default: flagged and failed]")
@click.option(
    "--sample", type=click.IntRange(min=1), metavar="N", help="Include N more, a random sample of all cutouts."
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=".", show_default=True)
def review(job: str, flagged: bool, failed: bool, sample: int | None, out: Path) -> None:
    """Make a page to review a job's images: before and after, worst edge at 100 %, figures, reasons; approve and
    reject. Any CPU worker makes the previews. Prints the page's path."""
    from producer.review.select import Selection, write_review

    takes_default = not (flagged or failed or sample)
    selection = Selection(flagged=flagged or takes_default, failed=failed or takes_default, sample=sample or 0)
    with open_services() as (settings, ledger, store):

        def on_submitted(previews: Job) -> None:
            click.echo(f"job {previews.id} makes {previews.total} previews", err=True)
            warn_if_unserved(previews, ledger)

        page = write_review(
            ledger.jobs.get(job),
            selection,
            out,
            store=store,
            ledger=ledger,
            lease_s=settings.lease_s,
            on_submitted=on_submitted,
        )
    click.echo(page)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
def workers(as_json: bool) -> None:
    """List the running workers: device, model, images in flight, rate."""
    from producer.console.fleet import print_workers

    with open_ledger() as (_, ledger):
        print_workers(ledger.fleet.workers(), as_json=as_json)


@click.command()
@click.option("--source", metavar=PREFIX, type=Location.parse, help="Prefix to try to read." + _NEWEST)
@destination_option(help="Prefix to try to write." + _NEWEST)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(source: Location | None, destination: Location | None, as_json: bool) -> None:
    """Check settings, disk, Redis, S3, workers and queues, and name a remedy for each problem. Exit code 1: an error
    was found."""
    from producer.doctor.checks import examine
    from producer.doctor.findings import is_well

    findings = []
    for finding in examine(source=source, destination=destination):
        findings.append(finding)
        if not as_json:
            click.echo("\n".join(finding.lines()))
    if as_json:
        rows = [dataclasses.asdict(finding) for finding in findings]
        click.echo(json.dumps({"well": is_well(findings), "findings": rows}, ensure_ascii=False))
    sys.exit(ExitCode.OK if is_well(findings) else ExitCode.FAILED)


COMMANDS = (status, jobs, wait, dead, review, workers, doctor)
