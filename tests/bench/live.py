"""How long a live image waits while a backfill runs: 200 submitted one by one, from the call to the claim.

    python -m tests.bench.live [--images N] [--live N] [--json FILE]

Real Valkey, SeaweedFS, dispatcher, submission and Celery worker; the device is a stand-in of 11 ms an image in batches
of 8. The waiting time should stay below two seconds (two batches take less). Ends with an error if a live image
failed or the backfill was over before the last of them.
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
from jobs.message import Lane
from jobs.recipe import Recipe
from jobs.s3.client import Location, Store
from producer.submission import submit as submission
from tests.bench.flow import fleet
from tests.bench.image_path import make_photo
from tests.bench.report import Row, fact, progress, row, tell
from tests.bench.worker import DEVICE_MS, start_stand_in

SIZE = (640, 480)
SLOTS = 24
LOOK_S = 0.005
PAUSE_S = 0.5
"""Between two live images: at most."""
UPLOADS = 16
BUSY = 100
"""Images of the backfill that are done before the first live one is submitted."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000, help="of the backfill")
    parser.add_argument("--live", type=int, default=200)
    tell(parser, measure)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    with fleet() as here, here.stack.store() as store, here.stack.ledger() as ledger:
        _, model = start_stand_in(here, DEVICE_MS, slots=str(SLOTS))
        for bucket in ("shop", "shop-cutouts"):
            store.create_bucket(bucket)
        _upload(store, "old", options.images)
        _upload(store, "new", options.live)
        progress(f"{options.images + options.live:,} images of {SIZE[0]} x {SIZE[1]} are there")
        backfill = _submit("old", "backfill", model, store, ledger)
        while ledger.job(backfill.id).done < BUSY:
            time.sleep(LOOK_S)
        began, before = time.monotonic(), ledger.job(backfill.id).done
        waits = [_wait_of(f"{number:05d}.jpg", model, store, ledger) for number in range(options.live)]
        seconds, after = time.monotonic() - began, ledger.job(backfill.id)
        assert after.open, "the backfill was over too soon: give it more images"
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
        places = (Location("shop", f"{folder}/{number:05d}.jpg") for number in range(count))
        for _ in pool.map(lambda place: store.put(place, photo, content_type="image/jpeg"), places):
            pass


def _submit(folder: str, lane: Lane, model: str, store: Store, ledger: Ledger, *, key: str = "") -> Job:
    request = submission.Request(
        source=f"s3://shop/{folder}/",
        destination=f"s3://shop-cutouts/{folder}/",
        recipe=Recipe(model=model, edges="off"),
        lane=lane,
        name="bench",
        keys=(f"{folder}/{key}",) if key else None,
    )
    return submission.submit(request, store=store, ledger=ledger, lease_s=60, listed=lambda _: None)


def _wait_of(key: str, model: str, store: Store, ledger: Ledger) -> tuple[float, float]:
    """Seconds from the call until the image is claimed, and until it is done."""
    time.sleep(random.uniform(0, PAUSE_S))  # at any point of the device's batches
    began = time.monotonic()
    job = _submit("new", "live", model, store, ledger, key=key)
    while ledger.place(f"{job.id}:0") == "waiting":
        time.sleep(LOOK_S)
    claimed = time.monotonic() - began
    while not (job := ledger.job(job.id)).final:
        time.sleep(LOOK_S)
    assert job.done == 1, job
    return claimed, time.monotonic() - began


def _finish(ledger: Ledger, backfill: Job, live: int) -> None:
    jobs = [job for job in ledger.jobs(limit=live + 1) if job.lane == "live"]
    assert sum(job.done for job in jobs) == live
    ledger.cancel(backfill.id)


if __name__ == "__main__":
    main()
