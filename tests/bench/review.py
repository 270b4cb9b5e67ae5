"""The review page: CPU time of a preview, and how soon Chromium shows a page from a file.

    python -m tests.bench.review [COUNT ...]

The images are synthetic, of up to 12 megapixels; each page has COUNT rows (default: 500 and 5,000) with a few previews
in turn.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from playwright.sync_api import sync_playwright

from jobs.job import Job
from jobs.preview import Preview
from jobs.recipe import Recipe
from jobs.s3.location import Location
from producer.review.page import Row, write_page
from tests.bench.image_path import make_mask, make_photo
from tests.support.environment import find_program
from tests.support.waiting import wait_until
from workers.imaging.decode import Limits, decode_image
from workers.imaging.edges import clean_edges
from workers.imaging.encode import encode_cutout_png
from workers.imaging.quality import measure_mask
from workers.imaging.resize import enlarge
from workers.models.device import limit_threads
from workers.tasks.preview import DrawnPreview, draw_cutout, draw_source

SHAPES = ((3000, 4000), (4000, 3000), (3000, 3000))
COUNTS = (500, 5000)
IS_SHOWN = "Boolean(document.querySelector('#whole .before')?.naturalWidth)"


def main(counts: Sequence[int]) -> None:
    limit_threads(1)
    previews = [make_preview(*shape) for shape in SHAPES]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_program("chromium"), args=["--no-sandbox"])
        for count in counts:
            path = Path(folder) / f"{count}.html"
            started = time.perf_counter()
            write_page(JOB, rows(previews, count), path, available=count)
            written_s = time.perf_counter() - started
            print(f"{count} images: {path.stat().st_size / 1e6:.0f} MB, written in {written_s:.1f} s")
            for turn in ("first", "second"):
                page = browser.new_page(viewport={"width": 1280, "height": 800})
                started = time.perf_counter()
                page.goto(path.as_uri(), wait_until="commit")
                wait_until(functools.partial(page.evaluate, IS_SHOWN), what="the first image is shown")
                usable_s = time.perf_counter() - started
                page.wait_for_load_state("load", timeout=120_000)
                loaded_s = time.perf_counter() - started
                page.close()
                print(f"  opened, {turn} time: first image after {usable_s:.2f} s, all loaded after {loaded_s:.2f} s")
        browser.close()


def make_preview(height: int, width: int) -> Preview:
    photo, mask = make_photo(height, width), enlarge(make_mask(), (height, width))
    image = decode_image(photo, limits=Limits(), animation="first")
    clean_edges(image.rgb, mask)
    cutout = encode_cutout_png(image.rgb, mask, text={})
    began = time.process_time()
    empty = Preview(figures=measure_mask(mask), review=("uncertain",))
    drawn = draw_cutout(decode_image(cutout, limits=Limits(), animation="first"), empty)
    done: DrawnPreview = draw_source(decode_image(photo, limits=Limits(), animation="first"), drawn)
    made = done.encode()
    cost = time.process_time() - began
    kilobytes = sum(map(len, made.images.values())) * 0.75e-3
    print(f"a preview of {width} x {height}: {1000 * cost:.0f} ms on one core, {kilobytes:.0f} kB")
    return made


def rows(previews: Sequence[Preview], count: int) -> Iterator[Row]:
    for number in range(count):
        yield Row(f"photos/{number:06d}.jpg", None, previews[number % len(previews)])


JOB = Job(
    id="20261124-120000-abcdef",
    name="bench",
    source=Location("shop", "photos/"),
    destination=Location("cutouts", ""),
    recipe_json=Recipe().to_json(),
    model="u2netp",
    lane="backfill",
    conditional=True,
    created=0.0,
)

if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or COUNTS)
