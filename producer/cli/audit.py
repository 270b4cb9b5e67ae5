"""`cutfleet audit`: compare a job's manifest, outputs and ledger."""

from __future__ import annotations

import collections
import dataclasses
import json
import sys
from typing import TYPE_CHECKING

import click

from producer.cli.session import ExitCode, open_services, progress

if TYPE_CHECKING:
    from producer.audit.outputs import Disagreement

EXAMPLES = 5


@click.command()
@click.argument("what", metavar="JOB|s3://TO/_cutfleet/JOB/")
@click.option("--repair", is_flag=True, help="Repair what can be repaired; dispatcher and workers do the rest.")
@click.option("--deep", is_flag=True, help="Compare each cutout with its source and mask: two requests an image.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line for each disagreement.")
def audit(what: str, repair: bool, deep: bool, as_json: bool) -> None:
    """Compare a job's manifest, outputs and ledger. Exit code 0: they agree, or all is repaired; 1: they do not."""
    from producer.audit import auditor

    summary = _Summary()
    with open_services() as (_, ledger, store), progress("checked") as seen:
        for found in auditor.audit(what, repair=repair, deep=deep, ledger=ledger, store=store, seen=seen):
            summary.add(found)
            if as_json:
                click.echo(json.dumps(dataclasses.asdict(found), ensure_ascii=False))
    if not as_json:
        summary.print(repair=repair)
    sys.exit(ExitCode.FAILED if summary.unrepaired else ExitCode.OK)


class _Summary:
    """Counts of disagreements by code, with a few examples of each."""

    def __init__(self) -> None:
        self.unrepaired = 0
        self._counts: collections.Counter[str] = collections.Counter()
        self._examples: dict[str, list[Disagreement]] = collections.defaultdict(list)

    def add(self, found: Disagreement) -> None:
        self.unrepaired += not found.repaired
        self._counts[found.code] += 1
        if self._counts[found.code] <= EXAMPLES:
            self._examples[found.code].append(found)

    def print(self, *, repair: bool) -> None:
        for code, count in self._counts.items():
            click.echo(f"{code}: {count}")
            for found in self._examples[code]:
                key = f"{found.key}: " if found.key else ""
                click.echo(f"  {key}{found.what}" + (f"  -> {found.repaired}" if found.repaired else ""))
            if count > EXAMPLES:
                click.echo(f"  and {count - EXAMPLES} more: --json lists them all")
        total = self._counts.total()
        if not total:
            click.echo("Nothing disagrees.", err=True)
        elif repair:
            click.echo(f"{total - self.unrepaired} repaired, {self.unrepaired} not.", err=True)
        else:
            click.echo("--repair repairs all but objects to delete and data that is lost for good.", err=True)


COMMANDS = (audit,)
