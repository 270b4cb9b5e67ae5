"""Create jobs: submit, render; and estimate one: plan."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING

import click

from jobs.errors import SettingsError
from producer.cli.options import (
    RecipeOptions,
    SourceOptions,
    destination_option,
    lane_option,
    recipe_options,
    source_options,
    webhook_images_option,
    webhook_option,
)
from producer.cli.session import check_webhook_options, open_services, progress, wait_and_summarize, warn_if_unserved
from producer.console.output import estimate_lines, format_count

if TYPE_CHECKING:
    from jobs.job import Job
    from jobs.ledger import Ledger
    from jobs.message import Lane
    from jobs.s3.client import Store
    from jobs.s3.location import Location
    from jobs.settings import Settings
    from producer.submission.request import Request

_WEIGHT, _COUNT = click.IntRange(1, 1000), click.IntRange(min=1)
_RATE = click.FloatRange(min=0, min_open=True)


@click.command()
@destination_option(help="Where to write the outputs.")
@recipe_options
@source_options
@lane_option
@click.option("--weight", type=_WEIGHT, default=1, show_default=True, help="Share of the queue against other jobs.")
@click.option("--rate", type=_RATE, metavar="N", help="Feed at most N images a second.")
@click.option(
    "--sample",
    type=_COUNT,
    metavar="N",
    help="Pause the job after the first N images; `cutfleet unpause` continues it.",
)
@webhook_option
@webhook_images_option
@click.option("--name", metavar="TEXT", default="", help="Name of the job in lists.")
@click.option(
    "--confirm-over",
    metavar="N",
    type=click.IntRange(min=0),
    default=100_000,
    show_default=True,
    help="Show an estimate and ask before more than N images.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option(
    "--resume",
    metavar="JOB",
    help="Continue a stopped submission of JOB; give the same source, keys, manifest and filters.",
)
@click.option("--wait", is_flag=True, help="Wait until the job is closed.")
def submit(
    source: SourceOptions,
    destination: Location | None,
    recipe: RecipeOptions,
    lane: Lane,
    weight: int,
    rate: float | None,
    sample: int | None,
    webhook: str,
    webhook_images: bool,
    name: str,
    confirm_over: int,
    yes: bool,
    resume: str | None,
    wait: bool,
) -> None:
    """Create a job of all images under a prefix, of the given KEYs (complete, as S3 lists them; `-` reads them from
    stdin, one a line), or of a manifest. The last line on stdout is the job's id."""
    from producer.submission import submit as submission
    from producer.submission.request import NOWHERE

    if resume is None and destination is None:
        raise SettingsError("A submission needs a destination: add --to s3://BUCKET/PREFIX.")
    with source.stdin_as_file() as source, open_services() as (settings, ledger, store):
        check_webhook_options(webhook, webhook_images, settings)
        request = _request(source, recipe, settings, lane=lane, destination=destination or NOWHERE, name=name)
        request = dataclasses.replace(request, weight=weight, rate=rate, sample=sample)
        request = dataclasses.replace(request, webhook=webhook, webhook_images=webhook_images)
        if resume is None and not yes:
            _confirm(request, settings, store, ledger, over=confirm_over)
        with progress("listing") as listed:
            if resume is not None:
                job = submission.resume(resume, request, store=store, ledger=ledger, listed=listed, waiting=_print)
            else:
                job = submission.submit(
                    request, store=store, ledger=ledger, lease_s=settings.lease_s, listed=listed, waiting=_print
                )
        _conclude(job, ledger, wait=wait)


@click.command()
@recipe_options
@source_options
@click.option("--workers", type=_COUNT, metavar="N", help="[default: those that serve the model now]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(source: SourceOptions, recipe: RecipeOptions, workers: int | None, as_json: bool) -> None:
    """Estimate a submission: images, bytes, time and cost. Submits nothing."""
    from producer.submission.estimate import estimate
    from producer.submission.request import NOWHERE

    with source.stdin_as_file() as source, open_services() as (settings, ledger, store):
        request = _request(source, recipe, settings, lane="backfill", destination=NOWHERE, name="")
        with progress("listing") as listed:
            found = estimate(request, settings, workers=workers, store=store, ledger=ledger, listed=listed)
    lines = [json.dumps(found.summary(), ensure_ascii=False)] if as_json else estimate_lines(found, settings)
    click.echo("\n".join(lines))


@click.command()
@click.argument("job")
@click.option("--recipe", metavar="NAME|FILE", required=True, help="Its renditions are made; the cutout stays.")
@lane_option
@click.option("--wait", is_flag=True, help="Wait until the new job is closed.")
def render(job: str, recipe: str, lane: Lane, wait: bool) -> None:
    """Make renditions of a job's stored cutouts by another recipe, without the model, on any CPU worker. The last line
    on stdout is the new job's id."""
    from jobs.recipe import load_recipe
    from producer.submission.rerender import submit_rerender

    with open_services() as (settings, ledger, store):
        with progress("listing") as listed:
            old, lease_s = ledger.jobs.get(job), settings.lease_s
            created = submit_rerender(
                old, load_recipe(recipe), lane=lane, store=store, ledger=ledger, lease_s=lease_s, listed=listed
            )
        _conclude(created, ledger, wait=wait)


def _request(
    source: SourceOptions, recipe: RecipeOptions, settings: Settings, *, lane: Lane, destination: Location, name: str
) -> Request:
    from producer.submission.request import Request, refuse_line

    return Request(
        source=source.source,
        destination=destination,
        recipe=recipe.load(settings),
        lane=lane,
        name=name or str(source.source),
        keys=source.keys or None,
        manifest=source.manifest,
        only=source.listing_filter(),
        bad_line=refuse_line if source.bad_lines == "stop" else _print_bad_line,
    )


def _print_bad_line(number: int, reason: str) -> None:
    _print(f"line {number} of the manifest left out: {reason}")


def _confirm(request: Request, settings: Settings, store: Store, ledger: Ledger, *, over: int) -> None:
    """Ask before more than `over` images. Raises `SettingsError`: `needs_confirmation` without a terminal,
    `not_confirmed` for the answer no."""
    from producer.submission.estimate import estimate, has_more_than
    from producer.submission.request import refuse_line
    from producer.submission.validation import check_request

    silent = request.bad_line if request.bad_line is refuse_line else lambda *_: None
    request = dataclasses.replace(request, bad_line=silent)  # the submission reads the lines again and reports them
    check_request(request, ledger, store)
    if not has_more_than(over, request, store):
        return
    if not sys.stdin.isatty():
        raise SettingsError(
            f"There are more than {over:,} images. `cutfleet plan {request.source}` estimates time and cost; to submit "
            "them, add --yes, or --confirm-over with a larger number.",
            code="needs_confirmation",
        )
    with progress("listing") as listed:
        found = estimate(request, settings, workers=None, store=store, ledger=ledger, listed=listed)
    _print("\n".join(estimate_lines(found, settings)))
    if not click.confirm("Submit them?", err=True):
        raise SettingsError("Nothing was submitted.", code="not_confirmed")


def _conclude(job: Job, ledger: Ledger, *, wait: bool) -> None:
    """Print the new job; with `wait`, exit when it is closed."""
    _print(f"{format_count(job.total, 'image')} from {job.source} to {job.destination}, model {job.model}")
    warn_if_unserved(job, ledger)
    click.echo(job.id)
    if wait:
        sys.exit(wait_and_summarize(job.id, ledger))


def _print(text: str) -> None:
    click.echo(text, err=True)


COMMANDS = (plan, submit, render)
