"""`cutfleet audit`: what disagrees about a job, on one screen."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from producer.cli.session import ALL_DONE, WRONG, open_services, progress

if TYPE_CHECKING:
    from producer.audit.auditor import Disagreement

EXAMPLES = 5


@click.command()
@click.argument("what", metavar="JOB|s3://TO/_cutfleet/JOB/")
@click.option("--repair", is_flag=True, help="Put right what can be; the dispatcher and workers do the rest.")
@click.option("--deep", is_flag=True, help="Ask each cutout for its source and mask: two requests an image.")
@click.option("--json", "as_json", is_flag=True, help="For programs: one object a line, for all that disagrees.")
def audit(what: str, repair: bool, deep: bool, as_json: bool) -> None:
    """Compare a job's manifest, results and ledger. Exit code 0: they agree, or all was put right; 1: they do not."""
    import dataclasses

    from producer.audit import auditor as auditing

    kinds: dict[str, list[Disagreement]] = {}
    counts: dict[str, int] = {}
    left = 0
    with open_services() as (_, ledger, store), progress("looked at") as seen:
        for found in auditing.audit(what, repair=repair, deep=deep, ledger=ledger, store=store, seen=seen):
            counts[found.code] = counts.get(found.code, 0) + 1
            examples = kinds.setdefault(found.code, [])
            if len(examples) < EXAMPLES:
                examples.append(found)
            left += not found.repaired
            if as_json:
                click.echo(json.dumps(dataclasses.asdict(found), ensure_ascii=False))
    if not as_json:
        for code, examples in kinds.items():
            _show(examples, counts[code])
        _conclude(sum(counts.values()), left, repair=repair)
    sys.exit(WRONG if left else ALL_DONE)


def _show(examples: list[Disagreement], count: int) -> None:
    click.echo(f"{examples[0].code}: {count}")
    for found in examples:
        about = f"{found.key}: " if found.key else ""
        click.echo(f"  {about}{found.what}" + (f"  -> {found.repaired}" if found.repaired else ""))
    if count > len(examples):
        click.echo(f"  and {count - len(examples)} more: --json lists them all")


def _conclude(count: int, left: int, *, repair: bool) -> None:
    if not count:
        click.echo("Nothing disagrees.", err=True)
    elif not repair:
        click.echo(
            "--repair puts right what can be: everything but what is to be deleted and what is lost for good.", err=True
        )
    else:
        click.echo(f"{count - left} put right, {left} left.", err=True)


COMMANDS = (audit,)
