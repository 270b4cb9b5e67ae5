"""What there is to work with: workers, models, doctor."""

from __future__ import annotations

import json
import sys

import click

from producer.cli.session import ALL_DONE, WRONG, open_ledger


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For programs: one object a line.")
def workers(as_json: bool) -> None:
    """The workers that are alive: device, model, what they hold, how fast they are."""
    from producer.console.fleet import show_workers

    with open_ledger() as (_, ledger):
        show_workers(ledger.workers(), as_json=as_json)


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="For programs: one object a line.")
@click.pass_context
def models(ctx: click.Context, as_json: bool) -> None:
    """The models by name: size, licence, input size, and whether they are on this machine."""
    from producer.console.fleet import show_models

    if ctx.invoked_subcommand is None:
        show_models(as_json=as_json)


@models.command()
@click.argument("name")
@click.option(
    "--revision", default="", metavar="SHA", help="All 40 digits.  [default: the one pinned here, or today's]"
)
def pull(name: str, revision: str) -> None:
    """Fetch a model's files ahead of time and pin their revision. Prints their folder."""
    from jobs import catalogue as presets

    click.echo(presets.pull(presets.find_preset(name), revision=revision))


@click.command()
@click.option("--source", metavar="s3://BUCKET/PREFIX", help="Try to read there.  [default: the newest open job's]")
@click.option("--to", "destination", metavar="s3://BUCKET/PREFIX", help="Try to write there.  [default: likewise]")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def doctor(source: str | None, destination: str | None, as_json: bool) -> None:
    """Look at settings, disk, Redis, S3, workers and queues, and say what to do about each. Exit code 1: something is
    wrong."""
    import dataclasses

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
    sys.exit(ALL_DONE if is_well(findings) else WRONG)


COMMANDS = (workers, models, doctor)
