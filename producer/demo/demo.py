"""`cutfleet demo`: runs the whole system on this machine, once, on photographs; its outputs stay in a folder.

OUT/sources, OUT/cutouts, OUT/masks: the images. OUT/contact-sheet.png: all of them side by side. OUT/system: data and
logs of the processes.
"""

from __future__ import annotations

import mimetypes
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import click

from jobs.job import Job
from jobs.ledger import Ledger
from jobs.recipe import Recipe
from jobs.s3.client import Store
from jobs.s3.location import Location
from producer.console.output import job_lines
from producer.console.progress import wait_until_closed
from producer.demo.local_stack import LocalStack, inherited_environment
from producer.submission.request import Request
from producer.submission.submit import submit

SAMPLES = Path(__file__).with_name("samples")
SOURCE, DESTINATION = Location("catalogue", "photos/"), Location("results", "")
MODEL = "u2netp"
TIMEOUT_S = 600.0
MAX_BYTES = 500_000_000
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".gif", ".heic", ".heif", ".jp2"}


def run_demo(photos: Path | None, out: Path, *, keep: bool) -> int:
    """Return the exit code: 0 if every image is done. `photos`: a folder of images; None: the samples. `keep`: keep the
    system running until Ctrl-C."""
    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # leaves the `with` block, as Ctrl-C does
    _clear(out)
    click.echo("starting Valkey, SeaweedFS, a dispatcher and a worker on this machine ...", err=True)
    with LocalStack(out / "system") as stack, stack.store() as store, stack.ledger() as ledger:
        stack.start_dispatcher()
        worker = stack.start_worker(model=MODEL, device="cpu")
        click.echo(f"ready after {time.monotonic() - started:.1f} s", err=True)
        names = _upload(photos, out, store)
        job = _run_job(store, ledger)
        _download(job, names, out, store)
        for line in job_lines(job):
            click.echo(line)
        for _, failure in ledger.images.failures(job.id):
            click.echo(f"failed:    {failure.key}: {failure.message} [{failure.code}]")
        if keep:
            _wait_for_interrupt(stack)
        else:
            worker.stop()
    draw_sheet = [sys.executable, "-m", "workers", "sheet", str(out)]
    subprocess.run(draw_sheet, check=True, env=inherited_environment())  # noqa: S603  (our own program)
    click.echo(f"cutouts:   {out / 'cutouts'}\nmasks:     {out / 'masks'}\nsheet:     {out / 'contact-sheet.png'}")
    click.echo("next:      cutfleet demo PHOTOS --keep   your own images, and the system keeps running")
    return 0 if job.closed is not None and job.done + job.skipped == job.total else 1


def _clear(out: Path) -> None:
    """Remove the images of an earlier demo, which left a `system` folder; leave any other folder as it is."""
    if (out / "system").is_dir():
        for name in ("sources", "cutouts", "masks"):
            shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)


def _upload(photos: Path | None, out: Path, store: Store) -> list[str]:
    """Put the images into the source bucket and into OUT/sources; return their names."""
    for location in (SOURCE, DESTINATION):
        store.create_bucket(location.bucket)
    (out / "sources").mkdir(exist_ok=True)
    found = sorted((photos or SAMPLES).iterdir())
    images = [path for path in found if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise click.UsageError(f"There are no images in {photos}.")
    for path in images:
        body = path.read_bytes()
        content_type = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        store.put(SOURCE.below(path.name), body, content_type=content_type)
        (out / "sources" / path.name).write_bytes(body)
    return [path.name for path in images]


def _run_job(store: Store, ledger: Ledger) -> Job:
    request = Request(
        source=SOURCE, destination=DESTINATION, recipe=Recipe(model=MODEL), lane="backfill", name="demo", keys=None
    )
    job = submit(request, store=store, ledger=ledger, lease_s=60, listed=lambda _: None)
    started = time.monotonic()
    job = wait_until_closed(job.id, ledger, timeout_s=TIMEOUT_S)
    click.echo(f"{job.total} images in {time.monotonic() - started:.1f} s", err=True)
    return job


def _download(job: Job, names: list[str], out: Path, store: Store) -> None:
    for name in names:
        paths = job.paths(SOURCE.below(name).key)
        for kind, location in (("cutouts", paths.cutout), ("masks", paths.mask)):
            if store.head(location, role="output") is None:
                continue
            body, _ = store.get(location, role="output", max_bytes=MAX_BYTES)
            (out / kind).mkdir(exist_ok=True)
            (out / kind / f"{name}.png").write_bytes(body)


def _wait_for_interrupt(stack: LocalStack) -> None:
    click.echo("The system runs until Ctrl-C. To use it in another shell:", err=True)
    for name, value in stack.environment.items():
        click.echo(f"  export {name}={value}")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        click.echo("stopping ...", err=True)
