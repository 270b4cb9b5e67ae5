"""Memory of a worker under constant load of 12-megapixel images, with a device that costs nothing: its peak, and
whether it grows.

    python -m tests.bench.memory [--minutes 1] [--slots N] [--limit-mb N] [--mixed] [--json FILE]

`--mixed`: JPEG, WebP and PNG with alpha in turn, with a marketplace's rendition. A worker above its limit exits, and
the benchmark ends with an error.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator

from jobs.recipe import Recipe, load_recipe
from tests.bench.flow import run_fleet
from tests.bench.footprint import make_image
from tests.bench.image_path import SIZES, make_photo
from tests.bench.report import Row, fact, progress, row, run_benchmark
from tests.bench.worker import SLOTS, start_stand_in

IMAGES = 60
MIX = ("jpeg", "webp", "png-alpha")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1, help="30 shows that it stays flat")
    parser.add_argument("--slots", type=int, default=SLOTS)
    parser.add_argument("--limit-mb", type=int, default=0, help="memory limit of the worker; 0: its default")
    parser.add_argument("--mixed", action="store_true")
    run_benchmark(parser, measure)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    peaks: list[float] = []
    with run_fleet() as fleet:
        worker, model = start_stand_in(fleet, 0, slots=str(options.slots), memory_mb=str(options.limit_mb))
        photos = [make_image(form, 12) for form in MIX] if options.mixed else [make_photo(*SIZES["12 MP"])]
        fleet.upload("flood", max(IMAGES, 3 * options.slots), *photos)
        recipe = load_recipe("amazon-main", model=model) if options.mixed else Recipe(model=model, edges="off")
        began = time.monotonic()
        while time.monotonic() < began + 60 * options.minutes or len(peaks) < 4:
            peaks.append(fleet.run("flood", recipe, [worker], slots=options.slots).peak_mb)
            progress(f"{(time.monotonic() - began) / 60:.1f} min: {peaks[-1]:,.0f} MB")
    half = len(peaks) // 2
    yield fact(f"12MP flood, {options.slots} slots: peak memory", max(peaks), "MB")
    early, late = statistics.median(peaks[1 : half + 1]), peaks[half:]
    yield row("12MP flood: memory in its second half", late, "MB", against="first half", others=[early])
    yield fact("12MP flood: images", len(peaks) * max(IMAGES, 3 * options.slots), "images")


if __name__ == "__main__":
    main()
