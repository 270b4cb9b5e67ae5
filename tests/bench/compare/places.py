"""Where a competitor reads and writes: SOURCE, TARGET and the number of images from the command line, S3 from
`AWS_*`, `AWS_ENDPOINT_URL_S3` included, as boto3 reads them.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@dataclasses.dataclass(frozen=True)
class Places:
    source: str
    target: str
    count: int

    @property
    def keys(self) -> list[str]:
        return [f"p{number:05d}.jpg" for number in range(self.count)]


def places() -> Places:
    source, target, count = sys.argv[1:4]
    return Places(source, target, int(count))


def client() -> Any:
    import boto3

    return boto3.client("s3")


def fetch(s3: Any, bucket: str, key: str) -> bytes:
    body: bytes = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
    return body


def publish(s3: Any, bucket: str, key: str, cutout: bytes, mask: bytes) -> None:
    for folder, body in (("masks", mask), ("cutouts", cutout)):
        s3.put_object(Bucket=bucket, Key=f"{folder}/{key}.png", Body=body, ContentType="image/png")


@contextmanager
def timed() -> Iterator[None]:
    """Tells how long the block took. What starts up, imports or loads stands before it."""
    started = time.perf_counter()
    yield
    print(json.dumps({"seconds": time.perf_counter() - started}))
