"""How long a live image waits while a backfill runs: 200 images submitted one by one, from submission to claim.

    python -m tests.bench.live [--images N] [--live N] [--json FILE]

Real Valkey, SeaweedFS, dispatcher, submission and Celery worker; the device is a stand-in of 11 ms per image in batches
of 8. The time should stay below two seconds, since two batches take less. Ends with an error if a live image fails or
the backfill ends before the last of them.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from jobs.job import Job
from jobs.ledger import Ledger
from jobs.ledger.window import Place
from jobs.message import Lane
from jobs.recipe import Recipe
from jobs.s3.client import Store
from jobs.s3.location import Location
from producer.submission.request import Request
from producer.submission.submit import submit
from tests.bench.flow import run_fleet
from tests.bench.image_path import make_photo
from tests.bench.report import Row, fact, progress, row, run_benchmark
from tests.bench.worker import DEVICE_MS, start_stand_in

SIZE = (640, 480)
SLOTS = 24
POLL_S = 0.005
PAUSE_S = 0.5
"""Longest pause between two live images."""
UPLOADS = 16
WARM_UP = 100
"""Images of the backfill that are done before the first live image is submitted."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000, help="images of the backfill")
    parser.add_argument("--live", type=int, default=200)
    run_benchmark(parser, measure)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    with run_fleet() as fleet, fleet.stack.store() as store, fleet.stack.ledger() as ledger:
        _, model = start_stand_in(fleet, DEVICE_MS, slots=str(SLOTS))
        for bucket in ("shop", "shop-cutouts"):
            store.create_bucket(bucket)
        _upload(store, "old", options.images)
        _upload(store, "new", options.live)
        progress(f"{options.images + options.live:,} images of {SIZE[0]} x {SIZE[1]} are uploaded")
        backfill = _submit("old", "backfill", model, store, ledger)
        while ledger.jobs.get(backfill.id).done < WARM_UP:
            time.sleep(POLL_S)
        began, before = time.monotonic(), ledger.jobs.get(backfill.id).done
        waits = [_measure_wait(f"{number:05d}.jpg", model, store, ledger) for number in range(options.live)]
        seconds, after = time.monotonic() - began, ledger.jobs.get(backfill.id)
        assert after.open, "the backfill ended too soon: use --images with more"
        _finish(ledger, backfill, options.live)
    claims, ends = zip(*waits, strict=True)
    yield fact("backfill, images", options.images, "")
    yield fact("backfill meanwhile", (after.done - before) / seconds, "images/s")
    yield row(f"{options.live} live images, submit to claim, median", claims, "s")
    yield fact("the same, 95th percentile", statistics.quantiles(claims, n=20)[18], "s")
    yield fact("the same, longest", max(claims), "s")
    yield row("submit to published, median", ends, "s")
    yield fact("the same, 95th percentile", statistics.quantiles(ends, n=20)[18], "s")


def _upload(store: Store, folder: str, count: int) -> None:
    photo = make_photo(*SIZE)
    with ThreadPoolExecutor(UPLOADS) as pool:
        locations = (Location("shop", f"{folder}/{number:05d}.jpg") for number in range(count))
        for _ in pool.map(lambda location: store.put(location, photo, content_type="image/jpeg"), locations):
            pass


def _submit(folder: str, lane: Lane, model: str, store: Store, ledger: Ledger, *, key: str = "") -> Job:
    request = Request(
        source=Location("shop", f"{folder}/"),
        destination=Location("shop-cutouts", f"{folder}/"),
        recipe=Recipe(model=model, edges="off"),
        lane=lane,
        name="bench",
        keys=(f"{folder}/{key}",) if key else None,
    )
    return submit(request, store=store, ledger=ledger, lease_s=60, listed=lambda _: None)


def _measure_wait(key: str, model: str, store: Store, ledger: Ledger) -> tuple[float, float]:
    """Return the seconds from submission until the image is claimed, and until it is done."""
    time.sleep(random.uniform(0, PAUSE_S))  # arrive at any point of a device batch
    began = time.monotonic()
    job = _submit("new", "live", model, store, ledger, key=key)
    while ledger.window.place(f"{job.id}:0") is Place.WAITING:
        time.sleep(POLL_S)
    claimed = time.monotonic() - began
    while not (job := ledger.jobs.get(job.id)).final:
        time.sleep(POLL_S)
    assert job.done == 1, job
    return claimed, time.monotonic() - began


def _finish(ledger: Ledger, backfill: Job, live: int) -> None:
    jobs = [job for job in ledger.jobs.newest(limit=live + 1) if job.lane == "live"]
    assert sum(job.done for job in jobs) == live
    ledger.jobs.cancel(backfill.id)


if __name__ == "__main__":
    main()
