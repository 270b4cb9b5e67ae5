"""Commands that run until they are stopped: dispatch, watch, serve; webhooks replay; demo."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from jobs.logs import set_up_logs
from jobs.s3.location import Location
from producer.cli.options import PREFIX, destination_option, webhook_images_option, webhook_option
from producer.cli.session import check_webhook_options, open_ledger, open_services, stop_event
from producer.console.output import format_count


@click.command()
def dispatch() -> None:
    """Run the dispatcher: feed the queues, requeue lost images, retry, close jobs, send webhooks. One is active, others
    are on standby."""
    from producer.dispatcher.dispatcher import Dispatcher
    from producer.webhooks.delivery import delivering

    stop = stop_event()
    with open_services() as (settings, ledger, store):
        set_up_logs(settings.log_format)
        dispatcher = Dispatcher(ledger, store, settings)
        with delivering(ledger, store, settings, stop), dispatcher.metrics.serve(settings.metrics_port):
            dispatcher.run(stop)


@click.group()
def webhooks() -> None:
    """Webhooks of a job: `webhooks replay JOB` sends them again."""


@webhooks.command()
@click.argument("job")
def replay(job: str) -> None:
    """Send a job's webhook events again: its closing, and its images if it was submitted with --webhook-images."""
    from producer.webhooks.delivery import replay as replay_events

    with open_ledger() as (settings, ledger):
        found = ledger.jobs.get(job)
        check_webhook_options(found.webhook, found.webhook_images, settings)
        count = replay_events(found, ledger=ledger)
    click.echo(f"Due again: {format_count(count, 'webhook')} of job {job}.", err=True)


@click.command()
@click.argument("source", metavar=PREFIX, type=Location.parse)
@destination_option(required=True, help="Where to write the outputs.")
@click.option("--model", metavar="NAME", help="Model that makes the masks.  [default: CUTFLEET_MODEL]")
@click.option("--queue", metavar="URL", help="SQS queue that receives S3's event notifications; it is emptied.")
@click.option(
    "--listen", metavar="HOST:PORT", help="Receive event notifications by POST /events (CUTFLEET_WATCH_TOKEN)."
)
@webhook_option
@webhook_images_option
@click.option(
    "--existing", is_flag=True, help="If no earlier listing is recorded, also take the objects that exist already."
)
@click.option(
    "--sweep-every",
    "sweep_every_s",
    type=click.FloatRange(min=1),
    default=900,
    show_default=True,
    metavar="S",
    help="List the prefix every S seconds, for objects without a notification.",
)
def watch(
    source: Location,
    destination: Location,
    model: str | None,
    queue: str | None,
    listen: str | None,
    webhook: str,
    webhook_images: bool,
    existing: bool,
    sweep_every_s: float,
) -> None:
    """Cut out each image that arrives under a prefix, on the live lane, in one job a day. Runs until it is stopped."""
    from jobs.recipe import Recipe
    from producer.ingest.watcher import Watcher, run_watch
    from producer.submission.request import Request

    stop = stop_event()
    with open_services() as (settings, ledger, store):
        set_up_logs(settings.log_format)
        check_webhook_options(webhook, webhook_images, settings)
        request = Request(
            source=source,
            destination=destination,
            recipe=Recipe(model=model or settings.model),
            lane="live",
            name=f"watch {source}",
            keys=None,
            webhook=webhook,
            webhook_images=webhook_images,
        )
        watcher = Watcher(request, store=store, ledger=ledger, lease_s=settings.lease_s)
        watcher.begin(existing=existing)
        token = settings.watch_token
        run_watch(watcher, stop, queue=queue, listen=listen, token=token, sweep_every_s=sweep_every_s)


@click.command()
@click.option(
    "--listen",
    metavar="HOST:PORT",
    default="127.0.0.1:8080",
    show_default=True,
    help="Speaks HTTP only: put a TLS proxy before it.",
)
def serve(listen: str) -> None:
    """Serve the HTTP API: submit images, follow and cancel requests, fetch results. Runs until it is stopped."""
    from producer.api.app import serve as serve_api

    with open_services() as (settings, ledger, store):
        set_up_logs(settings.log_format)
        serve_api(listen, settings, ledger, store)


@click.command()
@click.argument("photos", type=click.Path(exists=True, file_okay=False, path_type=Path), required=False)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("demo-output"), show_default=True)
@click.option("--keep", is_flag=True, help="Keep the local system running afterwards, until Ctrl-C.")
def demo(photos: Path | None, out: Path, keep: bool) -> None:
    """Run the whole system on this machine, once: servers, dispatcher, worker, a job, a contact sheet. PHOTOS: a folder
    of images to use instead of the samples."""
    from producer.demo.demo import run_demo

    sys.exit(run_demo(photos, out, keep=keep))


COMMANDS = (dispatch, watch, serve, webhooks, demo)
