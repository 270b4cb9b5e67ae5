"""The state of the fleet: workers, doctor."""

from __future__ import annotations

import dataclasses
import json
import sys

import click

from jobs.s3.location import Location, parse_destination
from producer.cli.session import ExitCode, open_ledger


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
def workers(as_json: bool) -> None:
    """List the running workers: device, model, images in flight, rate."""
    from producer.console.fleet import print_workers

    with open_ledger() as (_, ledger):
        print_workers(ledger.fleet.workers(), as_json=as_json)


@click.command()
@click.option(
    "--source",
    metavar="s3://BUCKET/PREFIX",
    type=Location.parse,
    help="Prefix to try to read.  [default: the newest open job's]",
)
@click.option(
    "--to",
    "destination",
    metavar="s3://BUCKET/PREFIX",
    type=parse_destination,
    help="Prefix to try to write.  [default: the newest open job's]",
)
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


COMMANDS = (workers, doctor)
