"""Memory of an image between decoding and publishing in bytes per pixel, which `workers/process/memory.py` estimates.

    python -m tests.bench.footprint [--megapixels 12]

A fresh process for each case; resident memory is read every half millisecond, so a shorter peak may be missed.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import threading
import time

import numpy as np
from PIL import Image

from workers.imaging.pixels import Pixels

CASES = [(form, "default") for form in ("jpeg", "jpeg-cmyk", "png", "png-alpha", "webp")]
CASES += [("jpeg", "amazon-main"), ("png-alpha", "amazon-main")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megapixels", type=float, default=12)
    parser.add_argument("--case", nargs=2, metavar=("FORM", "RECIPE"), help="measure only this case, in this process")
    options = parser.parse_args()
    if options.case:
        form, recipe_name = options.case
        print(f"{bytes_per_pixel(form, recipe_name, options.megapixels):.1f}")
        return
    print("| image | recipe | bytes per pixel |\n|---|---|---|")
    for case in CASES:
        command = [sys.executable, "-m", "tests.bench.footprint", "--megapixels", str(options.megapixels), "--case"]
        measured = subprocess.run([*command, *case], capture_output=True, text=True, check=True)
        print(f"| {case[0]} | {case[1]} | {measured.stdout.strip()} |", flush=True)


def bytes_per_pixel(form: str, recipe_name: str, megapixels: float) -> float:
    from jobs.recipe import load_recipe
    from workers.imaging.decode import Limits
    from workers.imaging.pipeline import cut_out
    from workers.models.device import limit_threads
    from workers.process.memory import resident_bytes

    limit_threads(torch_threads=1)
    recipe = load_recipe(recipe_name, model="u2netp")
    limits = Limits(max_pixels=1_000_000_000, max_bytes=1_000_000_000)
    data = make_image(form, megapixels)
    cut_out(make_image(form, 0.01), recipe, Disc(), limits=limits, text={})
    peak, ended, before = 0, threading.Event(), resident_bytes()

    def watch() -> None:
        nonlocal peak
        while not ended.is_set():
            peak = max(peak, resident_bytes())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    cut_out(data, recipe, Disc(), limits=limits, text={})
    ended.set()
    watcher.join()
    return (peak - before) / (megapixels * 1e6)


class Disc:
    """A model that costs nothing: a disc."""

    input_size = (320, 320)

    def predict(self, rgb: Pixels, *, live: bool = False) -> Pixels:
        y, x = np.ogrid[:320, :320]
        return np.asarray(np.clip(130 - np.hypot(x - 160, y - 160), 0, 10).astype(np.uint8) * 25)


def make_image(form: str, megapixels: float) -> bytes:
    width, height = (round(side * (megapixels / 12) ** 0.5) for side in (4000, 3000))
    noise = np.random.default_rng(1).integers(0, 255, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    if form.endswith("alpha"):
        image.putalpha(128)
    body = io.BytesIO()
    kind = form.partition("-")[0]
    options = {"compress_level": 1} if kind == "png" else {"quality": 90}
    (image.convert("CMYK") if form.endswith("cmyk") else image).save(body, kind, **options)
    return body.getvalue()


if __name__ == "__main__":
    main()
