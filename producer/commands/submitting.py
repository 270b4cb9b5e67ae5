"""Asking for pictures: submit, render, and the recipes they name."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from jobs.errors import SettingsError
from producer.commands.session import (
    check_webhook,
    gathers,
    is_served,
    open_services,
    progress,
    wait_until_closed,
)

if TYPE_CHECKING:
    from jobs.job import Job
    from jobs.ledger import Ledger
    from jobs.message import Lane
    from jobs.recipe import Recipe
    from jobs.settings import Settings
    from producer.sources import Only, Report
    from producer.submit import Request

_MB = click.FloatRange(min=0)
_DATE = click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"])


@dataclasses.dataclass(frozen=True)
class Sought:
    """Which pictures are asked for, in the options' own terms."""

    source: str
    keys: tuple[str, ...]
    manifest: str | None
    bad_lines: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    min_mb: float | None
    max_mb: float | None
    since: datetime | None
    until: datetime | None

    def only(self) -> Only:
        """Raises `SettingsError` where there is no listing to limit."""
        from producer.sources import EVERYTHING, Only

        if self.keys and self.manifest is not None:
            raise SettingsError("Name keys or give a manifest (--from), not both.")
        only = Only(
            include=self.include,
            exclude=self.exclude,
            min_bytes=round(1e6 * (self.min_mb or 0)),
            max_bytes=None if self.max_mb is None else round(1e6 * self.max_mb),
            since=self.since.replace(tzinfo=UTC).timestamp() if self.since else None,
            until=self.until.replace(tzinfo=UTC).timestamp() if self.until else None,
        )
        if only != EVERYTHING and (self.keys or self.manifest is not None):
            raise SettingsError("Patterns and limits are for a listing: leave lines out of the manifest itself.")
        return only

    def named(self) -> tuple[str, ...] | None:
        """The keys, those on stdin among them; None where none was named."""
        return tuple(_read_keys(self.keys)) if self.keys else None

    def bad_line(self) -> Report:
        from producer.sources import refuse_line

        return refuse_line if self.bad_lines == "stop" else _tell_bad_line


_SOUGHT = (
    click.argument("source", metavar="s3://BUCKET/PREFIX"),
    click.argument("keys", metavar="[KEY ...|-]", nargs=-1),
    click.option(
        "--from", "manifest", metavar="FILE|s3://...|-", help="Keys from CSV, JSONL, Parquet or an S3 Inventory."
    ),
    click.option(
        "--bad-lines", type=click.Choice(["stop", "skip"]), default="stop", show_default=True, help="Of a manifest."
    ),
    click.option("--include", metavar="PATTERN", multiple=True, help="Of a listing: only keys like this, as `*.jpg`."),
    click.option("--exclude", metavar="PATTERN", multiple=True, help="Of a listing: no keys like this."),
    click.option("--min-mb", type=_MB, metavar="MB", help="Of a listing: no smaller objects."),
    click.option("--max-mb", type=_MB, metavar="MB", help="Of a listing: no larger objects."),
    click.option("--since", type=_DATE, metavar="DATE", help="Of a listing: last written then or later (UTC)."),
    click.option("--until", type=_DATE, metavar="DATE", help="Of a listing: last written before (UTC)."),
)


@dataclasses.dataclass(frozen=True)
class Made:
    """What is made of them."""

    recipe: str
    model: str | None
    keep_metadata: bool

    def of(self, settings: Settings) -> Recipe:
        from jobs.presets import RENDER
        from jobs.recipe import load_recipe

        if self.model == RENDER:
            raise SettingsError("To make renditions from stored cutouts: cutfleet render JOB --recipe NAME.")
        recipe = load_recipe(self.recipe, model=settings.model)
        keep_credit = self.keep_metadata or recipe.keep_credit
        return dataclasses.replace(recipe, model=self.model or recipe.model, keep_credit=keep_credit)


_MADE = (
    click.option("--recipe", metavar="NAME|FILE", default="default", help="Which pictures to make: see `recipes`."),
    click.option(
        "--model", metavar="NAME", help="Which model cuts them out.  [default: the recipe's, or CUTFLEET_MODEL]"
    ),
    click.option(
        "--keep-metadata", is_flag=True, help="Copy artist and copyright from the source; nothing else is kept."
    ),
)


@dataclasses.dataclass(frozen=True)
class Pace:
    """How, and how fast, a job is fed."""

    lane: Lane
    weight: int
    rate: float | None
    sample: int | None


_PACE = (
    click.option(
        "--lane",
        type=click.Choice(["live", "backfill"]),
        default="backfill",
        show_default=True,
        help="Live is always taken first.",
    ),
    click.option(
        "--weight", type=click.IntRange(1, 1000), default=1, show_default=True, help="Its share against other jobs'."
    ),
    click.option(
        "--rate", type=click.FloatRange(min=0, min_open=True), metavar="N", help="Feed at most N pictures a second."
    ),
    click.option(
        "--sample", type=click.IntRange(min=1), metavar="N", help="Pause after the first N; `unpause` goes on."
    ),
)


@dataclasses.dataclass(frozen=True)
class Told:
    """Who is told of the end."""

    webhook: str
    webhook_pictures: bool


_TOLD = (
    click.option("--webhook", metavar="URL", default="", help="Told, signed, when the job is closed."),
    click.option("--webhook-pictures", is_flag=True, help="Told of every picture, too."),
)


@click.command()
@click.option("--to", "destination", metavar="s3://BUCKET/PREFIX", help="Where cutouts and masks go.")
@gathers("made", Made, *_MADE)
@gathers("sought", Sought, *_SOUGHT)
@gathers("pace", Pace, *_PACE)
@gathers("told", Told, *_TOLD)
@click.option("--name", metavar="TEXT", default="", help="What the job is called in lists.")
@click.option(
    "--resume", metavar="JOB", help="List on where a stopped submission of JOB ended; the same source, keys and limits."
)
@click.option("--wait", is_flag=True, help="Wait until the job is closed.")
def submit(
    sought: Sought,
    destination: str | None,
    made: Made,
    pace: Pace,
    told: Told,
    name: str,
    resume: str | None,
    wait: bool,
) -> None:
    """Make a job of everything under a prefix, of the KEYs named (complete, as S3 lists them; `-` reads them from
    stdin, one a line), or of a manifest. The last line on stdout is the job's id."""
    from producer import submit as submission

    only = sought.only()
    if resume is None and destination is None:
        raise SettingsError("Say where the results go: --to s3://BUCKET/PREFIX.")
    with open_services() as (settings, ledger, store):
        check_webhook(told.webhook, told.webhook_pictures, settings)
        with progress("listing") as found:
            if resume is not None:
                job = submission.resume(
                    resume,
                    keys=sought.named(),
                    manifest=sought.manifest,
                    only=only,
                    bad_line=sought.bad_line(),
                    store=store,
                    ledger=ledger,
                    listed=found,
                )
            else:
                request = _request(sought, made, settings, destination, pace=pace, told=told, name=name)
                job = submission.submit(request, store=store, ledger=ledger, lease_s=settings.lease_s, listed=found)
        _tell_submitted(job, ledger)
        click.echo(job.id)
        if wait:
            sys.exit(wait_until_closed(job.id, ledger, timeout_s=None))


def _request(
    sought: Sought, made: Made, settings: Settings, destination: str | None, *, pace: Pace, told: Told, name: str
) -> Request:
    from producer.submit import Request

    return Request(
        source=sought.source,
        destination=str(destination),
        recipe=made.of(settings),
        lane=pace.lane,
        name=name or sought.source,
        keys=sought.named(),
        manifest=sought.manifest,
        only=sought.only(),
        bad_line=sought.bad_line(),
        weight=pace.weight,
        rate=pace.rate,
        sample=pace.sample,
        webhook=told.webhook,
        webhook_pictures=told.webhook_pictures,
    )


@click.command()
@click.argument("job")
@click.option("--recipe", metavar="NAME|FILE", required=True, help="Its renditions; what made the cutout stays.")
@click.option("--lane", type=click.Choice(["live", "backfill"]), default="backfill", show_default=True)
@click.option("--wait", is_flag=True, help="Wait until the new job is closed.")
def render(job: str, recipe: str, lane: str, wait: bool) -> None:
    """Make renditions of a job's stored cutouts by another recipe, without the model, on any CPU worker. The last line
    on stdout is the new job's id."""
    from jobs.recipe import load_recipe
    from producer import rerender

    with open_services() as (settings, ledger, store):
        with progress("listing") as found:
            made = rerender.render(
                ledger.job(job),
                load_recipe(recipe),
                lane="live" if lane == "live" else "backfill",
                store=store,
                ledger=ledger,
                lease_s=settings.lease_s,
                listed=found,
            )
        _tell_submitted(made, ledger)
        click.echo(made.id)
        if wait:
            sys.exit(wait_until_closed(made.id, ledger, timeout_s=None))


@click.group(invoke_without_command=True)
@click.pass_context
def recipes(context: click.Context) -> None:
    """The recipes that come along; `recipes show NAME` prints one, to be copied and changed."""
    from jobs.recipe import recipe_names, recipe_text

    if context.invoked_subcommand is None:
        names = recipe_names()
        for name in names:
            click.echo(f"{name:{max(map(len, names))}}  {recipe_text(name).splitlines()[0].removeprefix('# ')}")


@recipes.command()
@click.argument("name")
def show(name: str) -> None:
    """Print a recipe as TOML."""
    from jobs.recipe import recipe_text

    click.echo(recipe_text(name), nl=False)


def _tell_bad_line(number: int, reason: str) -> None:
    click.echo(f"line {number} of the manifest left out: {reason}", err=True)


def _read_keys(keys: tuple[str, ...]) -> Iterator[str]:
    for key in keys:
        if key == "-":
            yield from sys.stdin
        else:
            yield key


def _tell_submitted(job: Job, ledger: Ledger) -> None:
    from jobs.presets import RENDER

    click.echo(f"{job.total} pictures from {job.source} to {job.destination}, model {job.model}", err=True)
    if not is_served(job, ledger):
        wanted = "is on a CPU" if job.model == RENDER else f"serves model {job.model!r}"
        click.echo(f"No running worker {wanted}: the job waits until one does.", err=True)


COMMANDS = (submit, render, recipes)
