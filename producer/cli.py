"""The `cutfleet` command: parse, call, print, exit code. Results on stdout, progress and errors on stderr.

Exit codes: 0 all done, 1 some pictures failed, 2 usage or settings, 3 deadline passed, 4 a service can't be reached.
Imports stand inside the commands: `cutfleet --help` answers without loading Celery, boto3 or pydantic.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jobs.errors import CutfleetError, JobError, ServiceUnavailable, SettingsError, TransientError

if TYPE_CHECKING:
    import threading

    from jobs.job import Failure, Job
    from jobs.ledger import Ledger
    from jobs.message import Lane
    from jobs.recipe import Recipe
    from jobs.settings import Settings
    from jobs.store import Store

ALL_DONE, SOME_FAILED, USAGE, DEADLINE, UNREACHABLE = range(5)
WRONG = SOME_FAILED
_WEIGHT = click.IntRange(1, 1000)
_MB = click.FloatRange(min=0)
_DATE = click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"])
_RATE = click.FloatRange(min=0, min_open=True)


class _Commands(click.Group):
    """Turns our errors into one sentence and an exit code; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CutfleetError as exc:
            click.echo(f"cutfleet: {exc} [{exc.code}]", err=True)
            sys.exit(UNREACHABLE if isinstance(exc, (ServiceUnavailable, TransientError)) else USAGE)
        except KeyboardInterrupt:
            click.echo("cutfleet: interrupted", err=True)
            sys.exit(130)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cutfleet")
def main() -> None:
    """Point it at a bucket; get a cutout and a mask back for every picture, with the truth about each one."""


@main.command()
@click.argument("source", metavar="s3://BUCKET/PREFIX")
@click.argument("keys", metavar="[KEY ...|-]", nargs=-1)
@click.option("--to", "destination", metavar="s3://BUCKET/PREFIX", help="Where cutouts and masks go.")
@click.option("--recipe", metavar="NAME|FILE", default="default", help="Which pictures to make: see `recipes`.")
@click.option("--model", metavar="NAME", help="Which model cuts them out.  [default: the recipe's, or CUTFLEET_MODEL]")
@click.option("--keep-metadata", is_flag=True, help="Copy artist and copyright from the source; nothing else is kept.")
@click.option(
    "--lane",
    type=click.Choice(["live", "backfill"]),
    default="backfill",
    show_default=True,
    help="Live is always taken first.",
)
@click.option("--name", metavar="TEXT", default="", help="What the job is called in lists.")
@click.option(
    "--resume", metavar="JOB", help="List on where a stopped submission of JOB ended; the same source, keys and limits."
)
@click.option("--from", "manifest", metavar="FILE|s3://...|-", help="Keys from CSV, JSONL, Parquet or an S3 Inventory.")
@click.option(
    "--bad-lines", type=click.Choice(["stop", "skip"]), default="stop", show_default=True, help="Of a manifest."
)
@click.option("--include", metavar="PATTERN", multiple=True, help="Of a listing: only keys like this, as `*.jpg`.")
@click.option("--exclude", metavar="PATTERN", multiple=True, help="Of a listing: no keys like this.")
@click.option("--min-mb", type=_MB, metavar="MB", help="Of a listing: no smaller objects.")
@click.option("--max-mb", type=_MB, metavar="MB", help="Of a listing: no larger objects.")
@click.option("--since", type=_DATE, metavar="DATE", help="Of a listing: last written then or later (UTC).")
@click.option("--until", type=_DATE, metavar="DATE", help="Of a listing: last written before (UTC).")
@click.option("--weight", type=_WEIGHT, default=1, show_default=True, help="Its share against other jobs'.")
@click.option("--rate", type=_RATE, metavar="N", help="Feed at most N pictures a second.")
@click.option("--sample", type=click.IntRange(min=1), metavar="N", help="Pause after the first N; `unpause` goes on.")
@click.option("--webhook", metavar="URL", default="", help="Told, signed, when the job is closed.")
@click.option("--webhook-pictures", is_flag=True, help="Told of every picture, too.")
@click.option("--wait", is_flag=True, help="Wait until the job is closed.")
def submit(
    source: str,
    keys: tuple[str, ...],
    destination: str | None,
    recipe: str,
    model: str | None,
    keep_metadata: bool,
    lane: str,
    name: str,
    resume: str | None,
    manifest: str | None,
    bad_lines: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    min_mb: float | None,
    max_mb: float | None,
    since: datetime | None,
    until: datetime | None,
    weight: int,
    rate: float | None,
    sample: int | None,
    webhook: str,
    webhook_pictures: bool,
    wait: bool,
) -> None:
    """Make a job of everything under a prefix, of the KEYs named (complete, as S3 lists them; `-` reads them from
    stdin, one a line), or of a manifest. The last line on stdout is the job's id."""
    from producer import submit as submission
    from producer.sources import EVERYTHING, Only, refuse_line

    if resume is None and destination is None:
        raise SettingsError("Say where the results go: --to s3://BUCKET/PREFIX.")
    if keys and manifest is not None:
        raise SettingsError("Name keys or give a manifest (--from), not both.")
    only = Only(
        include=include,
        exclude=exclude,
        min_bytes=round(1e6 * (min_mb or 0)),
        max_bytes=None if max_mb is None else round(1e6 * max_mb),
        since=since.replace(tzinfo=UTC).timestamp() if since else None,
        until=until.replace(tzinfo=UTC).timestamp() if until else None,
    )
    if only != EVERYTHING and (keys or manifest is not None):
        raise SettingsError("Patterns and limits are for a listing: leave lines out of the manifest itself.")
    named = tuple(_read_keys(keys)) if keys else None
    bad_line = refuse_line if bad_lines == "stop" else _tell_bad_line
    with _services() as (settings, ledger, store):
        _check_webhook(webhook, webhook_pictures, settings)
        with _progress("listing") as found:
            if resume is not None:
                job = submission.resume(
                    resume,
                    keys=named,
                    manifest=manifest,
                    only=only,
                    bad_line=bad_line,
                    store=store,
                    ledger=ledger,
                    listed=found,
                )
            else:
                request = submission.Request(
                    source=source,
                    destination=str(destination),
                    recipe=_recipe(recipe, settings, model=model, keep_metadata=keep_metadata),
                    lane="live" if lane == "live" else "backfill",
                    name=name or source,
                    keys=named,
                    manifest=manifest,
                    only=only,
                    bad_line=bad_line,
                    weight=weight,
                    rate=rate,
                    sample=sample,
                    webhook=webhook,
                    webhook_pictures=webhook_pictures,
                )
                job = submission.submit(request, store=store, ledger=ledger, lease_s=settings.lease_s, listed=found)
        _tell_submitted(job, ledger)
        click.echo(job.id)
        if wait:
            sys.exit(_wait(job.id, ledger, timeout_s=None))


@main.command()
@click.argument("what", metavar="JOB|s3://BUCKET/KEY")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--failed", is_flag=True, help="List the pictures that failed: key, code, reason.")
@click.option("--flagged", is_flag=True, help="List the pictures to look at: key, why, rules that were not passed.")
@click.option("--watch", "live", is_flag=True, help="A live screen until the job is closed.")
def status(what: str, as_json: bool, failed: bool, flagged: bool, live: bool) -> None:
    """What became of a job, or of one source picture."""
    from dataclasses import asdict

    if live and (as_json or failed or flagged or what.startswith("s3://")):
        raise SettingsError("--watch shows a job, and goes with no other option.")
    if what.startswith("s3://"):
        _picture_status(what, as_json)
        return
    if live:
        _watch_job(what)
        return
    with _ledger() as (_, ledger):
        job = ledger.job(what)
        failures = _failures(job, ledger) if failed else []
        remarks = list(ledger.remarks(what).values()) if flagged else []
        if as_json:
            rows = [{"key": f.key, "code": f.code, "message": f.message, "tries": f.tries} for _, f in failures]
            told = job.summary() | {"tally": asdict(ledger.tally(what))} | ({"failures": rows} if failed else {})
            told |= {"flagged": [json.loads(remark.to_json()) for remark in remarks]} if flagged else {}
            click.echo(json.dumps(told, ensure_ascii=False))
            return
        if not failed and not flagged:
            _show_job(job, ledger)
        for _, failure in failures:
            click.echo(f"{failure.key}\t{failure.code}\t{failure.message}")
        for remark in remarks:
            click.echo(f"{remark.key}\t{','.join(remark.review)}\t{'; '.join(remark.complaints())}")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="For programs: one object a line.")
def jobs(as_json: bool) -> None:
    """The newest jobs."""
    from producer.show import jobs_table

    with _ledger() as (_, ledger):
        found = ledger.jobs()
        if as_json:
            for job in found:
                click.echo(json.dumps(job.summary(), ensure_ascii=False))
            return
        jobs_table(found)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="For programs: one object a line.")
def workers(as_json: bool) -> None:
    """The workers that are alive: device, model, what they hold, how fast they are."""
    from producer.fleet import show_workers

    with _ledger() as (_, ledger):
        show_workers(ledger.workers(), as_json=as_json)


@main.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="For programs: one object a line.")
@click.pass_context
def models(ctx: click.Context, as_json: bool) -> None:
    """The models by name: size, licence, input size, and whether they are on this machine."""
    from producer.fleet import show_models

    if ctx.invoked_subcommand is None:
        show_models(as_json=as_json)


@models.command()
@click.argument("name")
@click.option(
    "--revision", default="", metavar="SHA", help="All 40 digits.  [default: the one pinned here, or today's]"
)
def pull(name: str, revision: str) -> None:
    """Fetch a model's files ahead of time and pin their revision. Prints their folder."""
    from jobs import presets

    click.echo(presets.pull(presets.find_preset(name), revision=revision))


@main.command()
@click.argument("job")
@click.option("--timeout", "timeout_s", type=float, metavar="S", help="Give up after S seconds (exit code 3).")
def wait(job: str, timeout_s: float | None) -> None:
    """Wait until a job is closed: exit code 0 when all is done, 1 when some pictures failed."""
    with _ledger() as (_, ledger):
        ledger.job(job)
        sys.exit(_wait(job, ledger, timeout_s=timeout_s))


@main.command()
@click.argument("job")
@click.option("--recipe", metavar="NAME|FILE", required=True, help="Its renditions; what made the cutout stays.")
@click.option("--lane", type=click.Choice(["live", "backfill"]), default="backfill", show_default=True)
@click.option("--wait", is_flag=True, help="Wait until the new job is closed.")
def render(job: str, recipe: str, lane: str, wait: bool) -> None:
    """Make renditions of a job's stored cutouts by another recipe, without the model, on any CPU worker. The last line
    on stdout is the new job's id."""
    from jobs.recipe import load_recipe
    from producer import rerender

    with _services() as (settings, ledger, store):
        with _progress("listing") as found:
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
            sys.exit(_wait(made.id, ledger, timeout_s=None))


@main.group(invoke_without_command=True)
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


@main.command()
@click.argument("job")
@click.option("--weight", type=_WEIGHT, help="Its share against other jobs'.")
@click.option("--rate", type=click.FloatRange(min=0), metavar="N", help="At most N pictures a second; 0: no limit.")
@click.option("--lane", type=click.Choice(["live", "backfill"]), help="Live is always taken first.")
def tune(job: str, weight: int | None, rate: float | None, lane: Lane | None) -> None:
    """Change how fast a running job is fed; what is on its queue already is not touched."""
    if weight is None and rate is None and lane is None:
        raise SettingsError("Say what to change: --weight, --rate or --lane.")
    with _ledger() as (_, ledger):
        ledger.job(job)
        if not ledger.tune(job, weight=weight, rate=rate, lane=lane):
            raise JobError(f"Job {job} is closed: there is nothing left to feed.", code="job_closed")


@main.command()
@click.argument("job")
@click.option("--json", "as_json", is_flag=True, help="For programs: one object a line.")
def dead(job: str, as_json: bool) -> None:
    """The dead letters of a job: every picture that failed, its code, tries, time, worker and reason."""
    from producer.dead import failures_of, json_row
    from producer.show import dead_line

    with _services() as (_, ledger, store):
        for index, failure in failures_of(ledger.job(job), ledger=ledger, store=store):
            click.echo(json_row(index, failure) if as_json else dead_line(failure))


@main.command()
@click.argument("job")
@click.option("--code", metavar="C", help="Only those that failed with this code.")
def retry(job: str, code: str | None) -> None:
    """Try a job's failed pictures again, from what their sources are now. A closed job is open again."""
    from producer import dead as letters

    with _services() as (_, ledger, store):
        count = letters.retry(ledger.job(job), code, ledger=ledger, store=store)
    click.echo(f"{count} pictures of {job} are tried again.", err=True)


@main.command()
@click.argument("job")
def cancel(job: str) -> None:
    """Cancel a job: pictures in work end, the others become cancelled. What is done stays."""
    with _ledger() as (_, ledger):
        ledger.job(job)
        if not ledger.cancel(job):
            raise SettingsError(f"Job {job} is closed already: there is nothing to cancel.", code="job_closed")


@main.command()
@click.argument("job")
def pause(job: str) -> None:
    """Pause a job: what is on its queue goes on, nothing more is fed."""
    with _ledger() as (_, ledger):
        found = ledger.job(job)
        if found.closed is not None or found.cancelled:
            raise SettingsError(f"Job {job} is {found.state}: there is nothing to pause.", code="job_closed")
        ledger.pause(job, "by hand")


@main.command()
@click.argument("job")
def unpause(job: str) -> None:
    """Go on with a paused job."""
    with _ledger() as (_, ledger):
        ledger.job(job)
        if not ledger.unpause(job):
            raise SettingsError(f"Job {job} is not paused.", code="job_not_paused")


@main.command()
def dispatch() -> None:
    """Run the dispatcher: feeds the queues, publishes again what was lost, retries, closes jobs, sends
    webhooks. One is active, others stand by."""
    from jobs.logs import set_up_logs
    from producer.dispatcher import Dispatcher
    from producer.webhooks import delivering

    stop = _until_told_to_stop()
    with _services() as (settings, ledger, store):
        set_up_logs(settings.log_format)
        dispatcher = Dispatcher(ledger, store, settings)
        with delivering(ledger, store, settings, stop), dispatcher.metrics.serve(settings.metrics_port):
            dispatcher.run(stop)


@main.group()
def webhooks() -> None:
    """Webhooks of a job: `webhooks replay JOB` sends them again."""


@webhooks.command()
@click.argument("job")
def replay(job: str) -> None:
    """Send a job's webhooks again: that it is closed, and of its pictures if it was submitted so."""
    from producer.webhooks import replay as send_again

    with _ledger() as (settings, ledger):
        found = ledger.job(job)
        _check_webhook(found.webhook, found.webhook_pictures, settings)
        click.echo(f"{send_again(found, ledger=ledger)} webhooks of job {job} are due", err=True)


@main.command()
@click.argument("source", metavar="s3://BUCKET/PREFIX")
@click.option("--to", "destination", metavar="s3://BUCKET/PREFIX", required=True, help="Where cutouts and masks go.")
@click.option("--model", metavar="NAME", help="Which model cuts them out.  [default: CUTFLEET_MODEL]")
@click.option("--queue", metavar="URL", help="SQS queue that S3 sends its event notifications to; it is emptied.")
@click.option("--listen", metavar="HOST:PORT", help="Take event notifications by POST /events (CUTFLEET_WATCH_TOKEN).")
@click.option("--webhook", metavar="URL", default="", help="Told, signed, when a day's job is closed.")
@click.option("--webhook-pictures", is_flag=True, help="Told of every picture, too.")
@click.option("--existing", is_flag=True, help="The first time, also take what is there already.")
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
    webhook_pictures: bool,
    existing: bool,
    sweep_every_s: float,
) -> None:
    """Cut out whatever arrives under a prefix, on the live lane, in one job a day. Runs until it is stopped."""
    from jobs.logs import set_up_logs
    from jobs.recipe import Recipe
    from producer.submit import Request
    from producer.watch import Watcher, run_watch

    stop = _until_told_to_stop()
    with _services() as (settings, ledger, store):
        set_up_logs(settings.log_format)
        _check_webhook(webhook, webhook_pictures, settings)
        request = Request(
            source=source,
            destination=destination,
            recipe=Recipe(model=model or settings.model),
            lane="live",
            name=f"watch {source}",
            keys=None,
            webhook=webhook,
            webhook_pictures=webhook_pictures,
        )
        watcher = Watcher(request, store=store, ledger=ledger, lease_s=settings.lease_s)
        watcher.begin(existing=existing)
        token = settings.watch_token
        run_watch(watcher, stop, queue=queue, listen=listen, token=token, sweep_every_s=sweep_every_s)


@main.command()
@click.option("--listen", metavar="HOST:PORT", default="127.0.0.1:8080", show_default=True, help="Put TLS before it.")
def serve(listen: str) -> None:
    """Serve the HTTP API: pictures are asked for, followed, cancelled and fetched. Runs until it is stopped."""
    from jobs.logs import set_up_logs
    from producer.api import serve as serve_api

    with _services() as (settings, ledger, store):
        set_up_logs(settings.log_format)
        serve_api(listen, settings, ledger, store)


@main.command()
@click.option("--source", metavar="s3://BUCKET/PREFIX", help="Try to read there.  [default: the newest open job's]")
@click.option("--to", "destination", metavar="s3://BUCKET/PREFIX", help="Try to write there.  [default: likewise]")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def doctor(source: str | None, destination: str | None, as_json: bool) -> None:
    """Look at settings, disk, Redis, S3, workers and queues, and say what to do about each. Exit code 1: something is
    wrong."""
    import dataclasses

    from producer.doctor import examine
    from producer.findings import is_well

    findings = []
    for finding in examine(source=source, destination=destination):
        findings.append(finding)
        if not as_json:
            click.echo("\n".join(finding.lines()))
    if as_json:
        rows = [dataclasses.asdict(finding) for finding in findings]
        click.echo(json.dumps({"well": is_well(findings), "findings": rows}, ensure_ascii=False))
    sys.exit(ALL_DONE if is_well(findings) else WRONG)


@main.command()
@click.argument("photos", type=click.Path(exists=True, file_okay=False, path_type=Path), required=False)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("demo-output"), show_default=True)
@click.option("--keep", is_flag=True, help="Leave the local system running afterwards, until Ctrl-C.")
def demo(photos: Path | None, out: Path, keep: bool) -> None:
    """The whole system on this machine, once: servers, dispatcher, worker, a job, a contact sheet. PHOTOS: a folder of
    your own pictures instead of the ones that come along."""
    from producer.demo import run_demo

    sys.exit(run_demo(photos, out, keep=keep))


def _check_webhook(url: str, pictures: bool, settings: Settings) -> None:
    from producer.webhooks import check_webhook

    if url:
        check_webhook(url, settings)
    elif pictures:
        raise SettingsError("Say whom to tell of the pictures: --webhook URL.")


def _until_told_to_stop() -> threading.Event:
    """Set by SIGTERM and Ctrl-C."""
    import signal
    import threading

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


@contextmanager
def _ledger() -> Iterator[tuple[Settings, Ledger]]:
    from jobs.ledger import Ledger
    from jobs.settings import load_settings

    settings = load_settings()
    with Ledger(settings.redis_url, name=settings.redis_name) as ledger:
        yield settings, ledger


@contextmanager
def _services() -> Iterator[tuple[Settings, Ledger, Store]]:
    from jobs.store import Store

    with _ledger() as (settings, ledger):
        ledger.ping()
        with Store(settings.s3_endpoint, connections=16) as store:
            yield settings, ledger, store


def _recipe(name: str, settings: Settings, *, model: str | None, keep_metadata: bool) -> Recipe:
    from dataclasses import replace

    from jobs.presets import RENDER
    from jobs.recipe import load_recipe

    if model == RENDER:
        raise SettingsError("To make renditions from stored cutouts: cutfleet render JOB --recipe NAME.")
    recipe = load_recipe(name, model=settings.model)
    return replace(recipe, model=model or recipe.model, keep_credit=keep_metadata or recipe.keep_credit)


def _tell_bad_line(number: int, reason: str) -> None:
    click.echo(f"line {number} of the manifest left out: {reason}", err=True)


def _read_keys(keys: tuple[str, ...]) -> Iterator[str]:
    for key in keys:
        if key == "-":
            yield from sys.stdin
        else:
            yield key


@contextmanager
def _progress(what: str) -> Iterator[Any]:
    from producer.show import Counter

    with Counter(what) as counter:
        yield counter.update


def _tell_submitted(job: Job, ledger: Ledger) -> None:
    from jobs.presets import RENDER

    click.echo(f"{job.total} pictures from {job.source} to {job.destination}, model {job.model}", err=True)
    if not _is_served(job, ledger):
        wanted = "is on a CPU" if job.model == RENDER else f"serves model {job.model!r}"
        click.echo(f"No running worker {wanted}: the job waits until one does.", err=True)


def _is_served(job: Job, ledger: Ledger) -> bool:
    from producer.fleet import count_served

    return job.model in count_served(ledger.workers())


def _wait(job_id: str, ledger: Ledger, *, timeout_s: float | None) -> int:
    from producer.show import wait_for

    job = wait_for(job_id, ledger, timeout_s=timeout_s)
    _show_job(job, ledger, err=True)
    if job.closed is None:
        click.echo(f"cutfleet: still {job.open} pictures open after {timeout_s:g} s [deadline]", err=True)
        return DEADLINE
    return SOME_FAILED if job.failed else ALL_DONE


def _show_job(job: Job, ledger: Ledger, *, err: bool = False) -> None:
    from producer.show import job_lines

    served = job.closed is not None or _is_served(job, ledger)
    for line in job_lines(job, served=served, tally=ledger.tally(job.id)):
        click.echo(line, err=err)


def _failures(job: Job, ledger: Ledger) -> list[tuple[int, Failure]]:
    """In order of index. The store is asked only for what the ledger no longer holds."""
    if not job.spills:
        return sorted(ledger.failures(job.id), key=lambda pair: pair[0])
    from producer.dead import failures_of

    with _services() as (_, _, store):
        return sorted(failures_of(job, ledger=ledger, store=store), key=lambda pair: pair[0])


def _watch_job(job: str) -> None:
    from rich.console import Console

    from producer.live import watch_job

    with _ledger() as (_, ledger):
        ledger.job(job)
        watch_job(job, ledger, console=Console())


def _picture_status(uri: str, as_json: bool) -> None:
    from jobs.store import Location
    from producer.report import picture_status

    with _services() as (_, ledger, store):
        found = picture_status(Location.parse(uri), ledger=ledger, store=store)
    if as_json:
        click.echo(json.dumps(found.summary(), ensure_ascii=False))
        return
    for name, value in found.summary().items():
        click.echo(f"{name + ':':9} {value}")
