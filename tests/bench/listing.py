"""A parallel listing against a sequential one, on a store with high latency.

    nice python -m tests.bench.listing [--folders N] [--delay-ms MS] [--rounds N] [--json FILE]

Real SeaweedFS behind a proxy that delays both directions: a page of a thousand keys takes a quarter of a second longer,
as with S3.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from jobs.s3.client import PAGE_KEYS, S3Object, Store
from jobs.s3.listing import list_in_parallel
from jobs.s3.location import Location
from producer.demo.local_stack import ACCESS_KEY, SECRET_KEY, LocalStack
from tests.bench.report import Row, row, run_benchmark
from tests.faults.wire import Wire

BUCKET = Location("listed", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folders", type=int, default=12)
    parser.add_argument(
        "--delay-ms", type=float, default=50, help="delay of every 64 KB in both directions: five times per page"
    )
    parser.add_argument("--rounds", type=int, default=3)
    run_benchmark(parser, measure)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        stack = LocalStack(Path(folder))
        stack.start_s3()
        try:
            with stack.store() as store, Wire(stack.s3_port) as wire:
                _fill(store, options.folders)
                wire.delay_s = options.delay_ms / 1000
                url, credentials = f"http://127.0.0.1:{wire.port}", (ACCESS_KEY, SECRET_KEY, "us-east-1")
                with Store(url, connections=20, credentials=credentials) as distant:
                    yield _compare(distant, options.folders * PAGE_KEYS, options.rounds)
        finally:
            stack.stop()


def _fill(store: Store, folders: int) -> None:
    store.create_bucket(BUCKET.bucket)
    locations = (
        Location(BUCKET.bucket, f"{folder:03d}/{number:05d}.jpg")
        for folder in range(folders)
        for number in range(PAGE_KEYS)
    )
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for _ in pool.map(lambda location: store.put(location, b"", content_type="image/jpeg"), locations):
            pass


def _compare(store: Store, count: int, rounds: int) -> Row:
    def measure_rate(listing: Callable[[], Iterable[S3Object]]) -> float:
        started = time.perf_counter()
        assert len({found.key for found in listing()}) == count
        return count / (time.perf_counter() - started)

    parallel: list[float] = []
    sequential: list[float] = []
    for _ in range(rounds):
        parallel.append(measure_rate(lambda: list_in_parallel(store, BUCKET, role="source")))
        sequential.append(measure_rate(lambda: store.list_source(BUCKET)))
    return row("parallel listing", parallel, "keys/s", against="sequential listing", others=sequential, better="more")


if __name__ == "__main__":
    main()
