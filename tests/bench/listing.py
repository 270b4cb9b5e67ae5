"""A listing side by side against the same one from end to end, on a store that is far away.

    nice python -m tests.bench.listing [--folders N] [--delay-ms MS] [--rounds N] [--json FILE]

Real SeaweedFS; a proxy holds back what it sends and gets: a page of a thousand keys takes a quarter of a second more,
as S3 may.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from jobs.s3.client import PAGE_KEYS, Location, S3Object, Store
from jobs.s3.listing import list_side_by_side
from producer.demo.local_stack import ACCESS_KEY, SECRET_KEY, LocalStack
from tests.bench.report import Row, row, tell
from tests.faults.proxy import Wire

BUCKET = Location("listed", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folders", type=int, default=12)
    parser.add_argument(
        "--delay-ms", type=float, default=50, help="of every 64 KB, either way: five times of that a page"
    )
    parser.add_argument("--rounds", type=int, default=3)
    tell(parser, measure)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        stack = LocalStack(Path(folder))
        stack.start_s3()
        try:
            with stack.store() as store, Wire(stack.s3_port) as wire:
                _fill(store, options.folders)
                wire.delay_s = options.delay_ms / 1000
                url, credentials = f"http://127.0.0.1:{wire.port}", (ACCESS_KEY, SECRET_KEY, "us-east-1")
                with Store(url, connections=20, credentials=credentials) as far:
                    yield _compare(far, options.folders * PAGE_KEYS, options.rounds)
        finally:
            stack.stop()


def _fill(store: Store, folders: int) -> None:
    store.create_bucket(BUCKET.bucket)
    places = (
        Location(BUCKET.bucket, f"{folder:03d}/{number:05d}.jpg")
        for folder in range(folders)
        for number in range(PAGE_KEYS)
    )
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for _ in pool.map(lambda place: store.put(place, b"", content_type="image/jpeg"), places):
            pass


def _compare(store: Store, count: int, rounds: int) -> Row:
    def keys_a_second(listed: Callable[[], Iterable[S3Object]]) -> float:
        started = time.perf_counter()
        assert len({found.key for found in listed()}) == count
        return count / (time.perf_counter() - started)

    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(keys_a_second(lambda: list_side_by_side(store, BUCKET, role="source")))
        theirs.append(keys_a_second(lambda: store.list_source(BUCKET)))
    return row("listing side by side", ours, "keys/s", against="from end to end", others=theirs, better="more")


if __name__ == "__main__":
    main()
