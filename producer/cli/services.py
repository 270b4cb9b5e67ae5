"""What runs until it is stopped, or runs the whole system: dispatch, watch, serve, webhooks, demo."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from producer.cli.session import check_webhook, open_ledger, open_services, told_to_stop


@click.command()
def dispatch() -> None:
    """Run the dispatcher: feeds the queues, publishes again what was lost, retries, closes jobs, sends
    webhooks. One is active, others stand by."""
    from jobs.logs import set_up_logs
    from producer.dispatcher.dispatcher import Dispatcher
    from producer.webhooks.delivery import delivering

    stop = told_to_stop()
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
    """Send a job's webhooks again: that it is closed, and of its images if it was submitted so."""
    from producer.console.output import some
    from producer.webhooks.delivery import replay as send_again

    with open_ledger() as (settings, ledger):
        found = ledger.job(job)
        check_webhook(found.webhook, found.webhook_images, settings)
        click.echo(f"Due again: {some(send_again(found, ledger=ledger), 'webhook')} of job {job}.", err=True)


@click.command()
@click.argument("source", metavar="s3://BUCKET/PREFIX")
@click.option("--to", "destination", metavar="s3://BUCKET/PREFIX", required=True, help="Where cutouts and masks go.")
@click.option("--model", metavar="NAME", help="Which model cuts them out.  [default: CUTFLEET_MODEL]")
@click.option("--queue", metavar="URL", help="SQS queue that S3 sends its event notifications to; it is emptied.")
@click.option("--listen", metavar="HOST:PORT", help="Take event notifications by POST /events (CUTFLEET_WATCH_TOKEN).")
@click.option("--webhook", metavar="URL", default="", help="Told, signed, when a day's job is closed.")
@click.option("--webhook-images", is_flag=True, help="Told of every image, too.")
@click.option("--existing", is_flag=True, help="Where it remembers no listing, take what is there too.")
@click.option(
    "--sweep-every",
    "sweep_every_s",
    type=click.FloatRange(min=1),
    default=900,
    show_default=True,
    metavar="S",
    help="List the prefix for what no event told of.",
)
def watch(
    source: str,
    destination: str,
    model: str | None,
    queue: str | None,
    listen: str | None,
    webhook: str,
    webhook_images: bool,
    existing: bool,
    sweep_every_s: float,
) -> None:
    """Cut out whatever arrives under a prefix, on the live lane, in one job a day. Runs until it is stopped."""
    from jobs.logs import set_up_logs
    from jobs.recipe import Recipe
    from producer.ingest.watcher import Watcher, run_watch
    from producer.submission.submit import Request

    stop = told_to_stop()
    with open_services() as (settings, ledger, store):
        set_up_logs(settings.log_format)
        check_webhook(webhook, webhook_images, settings)
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
@click.option("--listen", metavar="HOST:PORT", default="127.0.0.1:8080", show_default=True, help="Put TLS before it.")
def serve(listen: str) -> None:
    """Serve the HTTP API: images are asked for, followed, cancelled and fetched. Runs until it is stopped."""
    from jobs.logs import set_up_logs
    from producer.api.app import serve as serve_api

    with open_services() as (settings, ledger, store):
        set_up_logs(settings.log_format)
        serve_api(listen, settings, ledger, store)


@click.command()
@click.argument("photos", type=click.Path(exists=True, file_okay=False, path_type=Path), required=False)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("demo-output"), show_default=True)
@click.option("--keep", is_flag=True, help="Leave the local system running afterwards, until Ctrl-C.")
def demo(photos: Path | None, out: Path, keep: bool) -> None:
    """The whole system on this machine, once: servers, dispatcher, worker, a job, a contact sheet. PHOTOS: a folder of
    your own images instead of the ones that come along."""
    from producer.demo.demo import run_demo

    sys.exit(run_demo(photos, out, keep=keep))


COMMANDS = (dispatch, watch, serve, webhooks, demo)
