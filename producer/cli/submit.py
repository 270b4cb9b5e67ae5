"""Create jobs: submit, render; and estimate one: plan."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING

import click

from jobs.errors import SettingsError
from jobs.message import LANES
from jobs.s3.location import Location, parse_destination
from producer.cli.options import (
    FeedOptions,
    RecipeOptions,
    SourceOptions,
    WebhookOptions,
    feed_options,
    option_group,
    recipe_options,
    source_options,
    webhook_options,
)
from producer.cli.session import check_webhook_options, open_services, progress, wait_and_summarize, warn_if_unserved

if TYPE_CHECKING:
    from jobs.job import Job
    from jobs.ledger import Ledger
    from jobs.message import Lane
    from jobs.s3.client import Store
    from jobs.settings import Settings
    from producer.submission.request import Request

_DEFAULT_FEED = FeedOptions()
_NO_WEBHOOK = WebhookOptions()


@dataclasses.dataclass(frozen=True)
class ConfirmOptions:
    """When to ask before a large submission."""

    confirm_over: int
    yes: bool


confirm_options = option_group(
    "confirm",
    ConfirmOptions,
    click.option(
        "--confirm-over",
        type=click.IntRange(min=0),
        default=100_000,
        show_default=True,
        metavar="N",
        help="Show an estimate and ask before more than N images.",
    ),
    click.option("--yes", is_flag=True, help="Do not ask."),
)


@click.command()
@click.option(
    "--to", "destination", metavar="s3://BUCKET/PREFIX", type=parse_destination, help="Where to write the outputs."
)
@recipe_options
@source_options
@feed_options
@webhook_options
@click.option("--name", metavar="TEXT", default="", help="Name of the job in lists.")
@confirm_options
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
    feed: FeedOptions,
    webhook: WebhookOptions,
    name: str,
    confirm: ConfirmOptions,
    resume: str | None,
    wait: bool,
) -> None:
    """Create a job of all images under a prefix, of the given KEYs (complete, as S3 lists them; `-` reads them from
    stdin, one a line), or of a manifest. The last line on stdout is the job's id."""
    from producer.submission import submit as submission

    if resume is None and destination is None:
        raise SettingsError("A submission needs a destination: add --to s3://BUCKET/PREFIX.")
    with source.stdin_as_file() as source, open_services() as (settings, ledger, store):
        check_webhook_options(webhook.webhook, webhook.webhook_images, settings)
        request = _request(source, recipe, settings, destination, feed=feed, webhook=webhook, name=name)
        if resume is None and not confirm.yes:
            _confirm(request, settings, store, ledger, over=confirm.confirm_over)
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
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="[default: those that serve the model now]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(source: SourceOptions, recipe: RecipeOptions, workers: int | None, as_json: bool) -> None:
    """Estimate a submission: images, bytes, time and cost. Submits nothing."""
    from producer.console.output import estimate_lines
    from producer.submission.estimate import estimate

    with source.stdin_as_file() as source, open_services() as (settings, ledger, store):
        request = _request(source, recipe, settings)
        with progress("listing") as listed:
            found = estimate(request, settings, workers=workers, store=store, ledger=ledger, listed=listed)
    click.echo(
        json.dumps(found.summary(), ensure_ascii=False) if as_json else "\n".join(estimate_lines(found, settings))
    )


@click.command()
@click.argument("job")
@click.option("--recipe", metavar="NAME|FILE", required=True, help="Its renditions are made; the cutout stays.")
@click.option("--lane", type=click.Choice(LANES), default="backfill", show_default=True)
@click.option("--wait", is_flag=True, help="Wait until the new job is closed.")
def render(job: str, recipe: str, lane: Lane, wait: bool) -> None:
    """Make renditions of a job's stored cutouts by another recipe, without the model, on any CPU worker. The last line
    on stdout is the new job's id."""
    from jobs.recipe import load_recipe
    from producer.submission.rerender import submit_rerender

    with open_services() as (settings, ledger, store):
        with progress("listing") as listed:
            created = submit_rerender(
                ledger.jobs.get(job),
                load_recipe(recipe),
                lane=lane,
                store=store,
                ledger=ledger,
                lease_s=settings.lease_s,
                listed=listed,
            )
        _conclude(created, ledger, wait=wait)


def _request(
    source: SourceOptions,
    recipe: RecipeOptions,
    settings: Settings,
    destination: Location | None = None,
    *,
    feed: FeedOptions = _DEFAULT_FEED,
    webhook: WebhookOptions = _NO_WEBHOOK,
    name: str = "",
) -> Request:
    from producer.submission.request import NOWHERE, Request

    return Request(
        source=source.source,
        destination=destination or NOWHERE,
        recipe=recipe.load(settings),
        name=name or str(source.source),
        keys=source.keys or None,
        manifest=source.manifest,
        only=source.listing_filter(),
        bad_line=source.line_report(),
        lane=feed.lane,
        weight=feed.weight,
        rate=feed.rate,
        sample=feed.sample,
        webhook=webhook.webhook,
        webhook_images=webhook.webhook_images,
    )


def _confirm(request: Request, settings: Settings, store: Store, ledger: Ledger, *, over: int) -> None:
    """Ask before more than `over` images. Raises `SettingsError`: `needs_confirmation` without a terminal,
    `not_confirmed` for the answer no."""
    from producer.console.output import estimate_lines
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
    from producer.console.output import format_count

    _print(f"{format_count(job.total, 'image')} from {job.source} to {job.destination}, model {job.model}")
    warn_if_unserved(job, ledger)
    click.echo(job.id)
    if wait:
        sys.exit(wait_and_summarize(job.id, ledger))


def _print(text: str) -> None:
    click.echo(text, err=True)


COMMANDS = (plan, submit, render)
