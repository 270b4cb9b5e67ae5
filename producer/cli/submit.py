"""Asking for images: plan, submit, render, and the recipes they name."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING

import click

from jobs.errors import SettingsError
from producer.cli.options import MADE, PACE, SOUGHT, TOLD, Made, Pace, Sought, Told, gathers
from producer.cli.session import check_webhook, open_services, progress, tell_unserved, wait_until_closed

if TYPE_CHECKING:
    from jobs.job import Job
    from jobs.ledger import Ledger
    from jobs.s3.client import Store
    from jobs.settings import Settings
    from producer.submission.submit import Request


@click.command()
@click.option("--to", "destination", metavar="s3://BUCKET/PREFIX", help="Where cutouts and masks go.")
@gathers("made", Made, *MADE)
@gathers("sought", Sought, *SOUGHT)
@gathers("pace", Pace, *PACE)
@gathers("told", Told, *TOLD)
@click.option("--name", metavar="TEXT", default="", help="What the job is called in lists.")
@click.option(
    "--confirm-over",
    type=click.IntRange(min=0),
    default=100_000,
    show_default=True,
    metavar="N",
    help="Show the plan and ask before more than N images.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
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
    confirm_over: int,
    yes: bool,
    resume: str | None,
    wait: bool,
) -> None:
    """Make a job of everything under a prefix, of the KEYs named (complete, as S3 lists them; `-` reads them from
    stdin, one a line), or of a manifest. The last line on stdout is the job's id."""
    from producer.submission import submit as submission

    if resume is None and destination is None:
        raise SettingsError("Say where the results go: --to s3://BUCKET/PREFIX.")
    with sought.here() as sought, open_services() as (settings, ledger, store):
        check_webhook(told.webhook, told.webhook_images, settings)
        request = _request(sought, made, settings, destination, pace=pace, told=told, name=name)
        if resume is None and not yes:
            _confirm(request, settings, store, ledger, over=confirm_over)
        with progress("listing") as found:
            if resume is not None:
                job = submission.resume(resume, request, store=store, ledger=ledger, listed=found, waiting=_tell)
            else:
                job = submission.submit(
                    request, store=store, ledger=ledger, lease_s=settings.lease_s, listed=found, waiting=_tell
                )
        _tell_submitted(job, ledger)
        click.echo(job.id)
        if wait:
            sys.exit(wait_until_closed(job.id, ledger, timeout_s=None))


@click.command()
@gathers("made", Made, *MADE)
@gathers("sought", Sought, *SOUGHT)
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="[default: those that serve the model now]")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def plan(sought: Sought, made: Made, workers: int | None, as_json: bool) -> None:
    """What a submission would take: images, bytes, time and cost. Nothing is submitted."""
    from producer.submission.estimate import plan as plan_for

    with sought.here() as sought, open_services() as (settings, ledger, store):
        request = _request(sought, made, settings, None, pace=Pace("backfill", 1, None, None), told=Told("", False))
        with progress("listing") as found:
            planned = plan_for(request, settings, workers=workers, store=store, ledger=ledger, listed=found)
    if as_json:
        click.echo(json.dumps(planned.summary(), ensure_ascii=False))
        return
    click.echo("\n".join(planned.lines(settings)))


def _confirm(request: Request, settings: Settings, store: Store, ledger: Ledger, *, over: int) -> None:
    """Raises `SettingsError` where nobody can be asked (`needs_confirmation`), or says no (`not_confirmed`)."""
    from producer.submission.estimate import has_more_than
    from producer.submission.estimate import plan as plan_for
    from producer.submission.sources import refuse_line
    from producer.submission.submit import check_request

    quiet = request.bad_line if request.bad_line is refuse_line else lambda *_: None
    request = dataclasses.replace(request, bad_line=quiet)  # told of once, by the submission
    check_request(request, ledger, store)
    if not has_more_than(over, request, store):
        return
    if not sys.stdin.isatty():
        raise SettingsError(
            f"There are more than {over:,} images. What they take: cutfleet plan {request.source}. To go on: --yes, "
            "or --confirm-over with a larger number.",
            code="needs_confirmation",
        )
    with progress("listing") as found:
        planned = plan_for(request, settings, workers=None, store=store, ledger=ledger, listed=found)
    click.echo("\n".join(planned.lines(settings)), err=True)
    if not click.confirm("Submit them?", err=True):
        raise SettingsError("Nothing was submitted.", code="not_confirmed")


def _request(
    sought: Sought,
    made: Made,
    settings: Settings,
    destination: str | None,
    *,
    pace: Pace,
    told: Told,
    name: str = "",
) -> Request:
    """`destination` None: of a plan, or of a job that has one."""
    from producer.submission.submit import Request

    return Request(
        source=sought.source,
        destination=destination or "",
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
        webhook_images=told.webhook_images,
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
    from producer.submission import rerender

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


def _tell(text: str) -> None:
    click.echo(text, err=True)


def _tell_submitted(job: Job, ledger: Ledger) -> None:
    from producer.console.output import some

    click.echo(f"{some(job.total, 'image')} from {job.source} to {job.destination}, model {job.model}", err=True)
    tell_unserved(job, ledger)


COMMANDS = (plan, submit, render, recipes)
