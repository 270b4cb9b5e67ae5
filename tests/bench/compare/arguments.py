"""Command line of a compared tool: SOURCE bucket, TARGET bucket and number of images. boto3 reads `AWS_*` and
`AWS_ENDPOINT_URL_S3` from the environment.
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
class Task:
    source: str
    target: str
    count: int

    @property
    def keys(self) -> list[str]:
        return [f"p{number:05d}.jpg" for number in range(self.count)]


def parse_arguments() -> Task:
    source, target, count = sys.argv[1:4]
    return Task(source, target, int(count))


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
    """Print how long the block takes. Start, imports and loading belong before it."""
    started = time.perf_counter()
    yield
    print(json.dumps({"seconds": time.perf_counter() - started}))
