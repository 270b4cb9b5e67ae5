"""What an image's three requests to S3 cost a worker: our Store (boto3) against obstore.

    pip install obstore && python -m tests.bench.clients [--rounds N] [--json FILE]

GET of the source, PUT of mask and cutout, the cutout on condition that nothing is there; one after the other, bodies as
large as those of a photograph. A second client would have to be worth one and a half times a worker's whole image.
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

from jobs.s3.client import Location, Store
from producer.demo.local_stack import LocalStack
from tests.bench.report import Row, row, tell

BUCKET = "images"
SIZES = {"12MP": (2_900_000, 170_000, 9_600_000), "2MP": (500_000, 30_000, 1_700_000)}
"""Bytes of source, mask and cutout."""
IMAGES = {"12MP": 8, "2MP": 30}

Do = Callable[[str, bytes, bytes], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    tell(parser, measure)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    numbers = itertools.count()
    with (
        tempfile.TemporaryDirectory(prefix="cutfleet-bench-") as folder,
        LocalStack(Path(folder)) as stack,
        stack.store() as store,
    ):
        store.create_bucket(BUCKET)
        ways = {"Store (boto3)": _by_store(store), "obstore": _by_obstore(stack)}
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
            ours, theirs = costs.values()
            yield row(f"{size}: requests of an image by our Store", ours, "CPU ms/image")
            yield row(f"{size}: the same by obstore", theirs, "CPU ms/image", against="our Store", others=ours)


def _by_store(store: Store) -> Do:
    metadata = {f"cf-{name}": "0" * 64 for name in ("source", "fingerprint", "revision")}

    def do(name: str, mask: bytes, cutout: bytes) -> None:
        store.get(Location(BUCKET, "source"), role="source", max_bytes=100_000_000)
        for folder, body in (("masks", mask), ("cutouts", cutout)):
            place = Location(BUCKET, f"{folder}/{name}.png")
            store.put(place, body, content_type="image/png", metadata=metadata, conditional=True)

    return do


def _by_obstore(stack: LocalStack) -> Do:
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
