"""The image path in threads as in a worker, without broker and store: files in memory, a device that costs nothing. The
baseline for a worker's throughput.

    python -m tests.bench.bare PHOTO --threads N --images N [--edges on]

Prints images per second and CPU milliseconds per image.
"""

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jobs.recipe import Recipe
from tests.bench.device_worker import StandIn, load_stand_in
from workers.imaging.decode import Limits
from workers.imaging.pipeline import cut_out
from workers.models.device import limit_threads


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("photo", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--edges", choices=("off", "estimate"), default="off")
    options = parser.parse_args()
    os.environ["BENCH_DEVICE_MS"] = "0"
    limit_threads(1)
    data, recipe = options.photo.read_bytes(), Recipe(edges=options.edges)
    with StandIn(load_stand_in(), batch_limit=1) as batcher, ThreadPoolExecutor(options.threads) as pool:

        def process_one(_: int) -> int:
            return len(cut_out(data, recipe, batcher, limits=Limits()).cutout)

        list(pool.map(process_one, range(2 * options.threads)))
        wall, cpu = time.perf_counter(), time.process_time()
        list(pool.map(process_one, range(options.images)))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(options.images / wall, cpu / options.images * 1000)


if __name__ == "__main__":
    main()
