"""Flower's memory while thousands of images pass, and its pages as PNG files, taken in headless Chromium.

    python -m tests.bench.flower [--images N] [--out infra/flower]

The device is a stand-in that takes no time; worker and Flower are real.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from tests.bench.flow import resident_mb
from tests.bench.report import Row, fact, to_markdown
from tests.faults.fleet import Fleet
from tests.faults.fork_server import ForkServer
from tests.support.environment import find_program
from tests.support.flower import Flower, Pages, open_pages
from tests.support.images import sample_image
from tests.support.places import Places
from tests.support.waiting import wait_until

KEPT = 1000
DEADLINE_S = 900.0
PLACES = Places("s3://shop/photos/", "s3://shop-cutouts/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--out", type=Path, default=Path("infra/flower"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cutfleet-flower-") as folder:
        fork_server = ForkServer(Path(folder))
        with Fleet(Path(folder) / "stack", fork_server) as fleet:
            flower = Flower(fleet.stack, f"--max_tasks={KEPT}")
            try:
                print(to_markdown(measure(fleet, flower, options.images, options.out)))
            finally:
                flower.process.stop(timeout_s=10)
        fork_server.stop()


def measure(fleet: Fleet, flower: Flower, images: int, out: Path) -> list[Row]:
    upload(fleet, images)
    for number in range(2):
        fleet.workers.start(node=f"cpu{number}", slots="8", batch_limit="8", lease_s="60", drain_s="20")
    fleet.dispatchers.start(lease_s="60")
    wait_until(lambda: len(flower.workers()) == 2, what="Flower shows the workers")
    began = time.monotonic()
    job = fleet.submit_in_process(PLACES, lane="backfill")
    wait_for(fleet, job, 2 * KEPT)
    early_mb = resident_mb(flower.process.pid)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=find_program("chromium"), args=["--no-sandbox"])
        with open_pages(flower, chromium) as pages:
            found = pages.search("args:lane='backfill'")
            shoot(pages, out / "tasks.png")
            pages.workers()
            shoot(pages, out / "workers.png")
            wait_for(fleet, job, images)
            took_s = time.monotonic() - began
            wait_until(lambda: processed(pages) >= images, what="Flower has counted every image")
            seen = processed(pages)
        chromium.close()
    late_mb, kept = resident_mb(flower.process.pid), len(flower.tasks("cutfleet.image"))
    assert found
    return [
        fact("images processed", images, "images"),
        fact("counted by Flower, messages delivered twice count twice", seen, "images"),
        fact("kept by Flower (--max_tasks)", kept, "images"),
        fact("rate", images / took_s, "images/s"),
        fact(f"memory after {2 * KEPT} images", early_mb, "MB"),
        fact("memory at the end", late_mb, "MB"),
    ]


def processed(pages: Pages) -> int:
    return sum(int(row["Processed"].replace(",", "")) for row in pages.workers())


def upload(fleet: Fleet, images: int) -> None:
    for location in (PLACES.source_location, PLACES.destination):
        fleet.store.create_bucket(location.bucket)
    body = sample_image()

    def put(number: int) -> None:
        fleet.store.put(PLACES.key(f"shoes/red-{number:04}.jpg"), body, content_type="image/jpeg")

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(put, range(images)))


def wait_for(fleet: Fleet, job: str, done: int) -> None:
    wait_until(lambda: fleet.ledger.jobs.get(job).final >= done, within_s=DEADLINE_S, what=f"{done} images")


def shoot(pages: Pages, to: Path) -> None:
    shot = Image.open(io.BytesIO(pages.page.screenshot())).convert("RGB")
    shot.resize((960, 540), Image.Resampling.LANCZOS).quantize(64).save(to, optimize=True)


if __name__ == "__main__":
    main()
