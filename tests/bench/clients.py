"""CPU time of an image's three S3 requests: our Store (boto3) against obstore.

    pip install obstore && python -m tests.bench.clients [--rounds N] [--json FILE]

GET of the source, PUT of mask and cutout with If-None-Match, one after the other, with bodies as large as those of a
photograph. A second client would have to make a worker's whole image one and a half times faster.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jobs.s3.client import Store
from jobs.s3.location import Location
from producer.demo.local_stack import LocalStack
from tests.bench.report import Row, row, run_benchmark

BUCKET = "images"
SIZES = {"12MP": (2_900_000, 170_000, 9_600_000), "2MP": (500_000, 30_000, 1_700_000)}
"""Bytes of source, mask and cutout."""
IMAGES = {"12MP": 8, "2MP": 30}

Requests = Callable[[str, bytes, bytes], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    run_benchmark(parser, measure)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    numbers = itertools.count()
    with (
        tempfile.TemporaryDirectory(prefix="cutfleet-bench-") as folder,
        LocalStack(Path(folder)) as stack,
        stack.store() as store,
    ):
        store.create_bucket(BUCKET)
        ways = {"Store (boto3)": _store_requests(store), "obstore": _obstore_requests(stack)}
        for size, (source, mask, cutout) in SIZES.items():
            store.put(Location(BUCKET, "source"), os.urandom(source), content_type="image/jpeg")
            bodies = os.urandom(mask), os.urandom(cutout)
            costs: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(options.rounds):
                for name, way in ways.items():
                    began = time.process_time()
                    for _ in range(IMAGES[size]):
                        way(f"p{next(numbers)}", *bodies)
                    costs[name].append((time.process_time() - began) * 1000 / IMAGES[size])
            ours, obstore = costs.values()
            yield row(f"{size}: requests of an image by our Store", ours, "CPU ms/image")
            yield row(f"{size}: the same by obstore", obstore, "CPU ms/image", against="our Store", others=ours)


def _store_requests(store: Store) -> Requests:
    metadata = {f"cf-{name}": "0" * 64 for name in ("source", "fingerprint", "revision")}

    def do(name: str, mask: bytes, cutout: bytes) -> None:
        store.get(Location(BUCKET, "source"), role="source", max_bytes=100_000_000)
        for folder, body in (("masks", mask), ("cutouts", cutout)):
            location = Location(BUCKET, f"{folder}/{name}.png")
            store.put(location, body, content_type="image/png", metadata=metadata, conditional=True)

    return do


def _obstore_requests(stack: LocalStack) -> Requests:
    import obstore
    from obstore.store import S3Store

    key, secret = stack.keys
    settings: dict[str, Any] = {"endpoint": stack.environment["CUTFLEET_S3_ENDPOINT"], "region": "us-east-1"}
    settings |= {"access_key_id": key, "secret_access_key": secret, "virtual_hosted_style_request": False}
    store = S3Store(BUCKET, client_options={"allow_http": True}, **settings)
    attributes: Any = {"Content-Type": "image/png"} | {f"cf-{name}": "0" * 64 for name in ("source", "revision")}

    def do(name: str, mask: bytes, cutout: bytes) -> None:
        bytes(obstore.get(store, "source").bytes())
        for folder, body in (("masks", mask), ("cutouts", cutout)):
            path = f"{folder}/{name}.png"
            obstore.put(store, path, body, attributes=attributes, mode="create", use_multipart=False)

    return do


if __name__ == "__main__":
    main()
