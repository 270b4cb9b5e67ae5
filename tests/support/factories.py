"""Things that tests are made of; a test names only what matters to it."""

from __future__ import annotations

import dataclasses
import io
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from standardwebhooks import Webhook

from jobs.job import Job
from jobs.ledger import Ledger
from jobs.recipe import Recipe
from jobs.s3.client import Location, Store
from producer.submission.submit import Request, submit


@dataclasses.dataclass(frozen=True)
class Places:
    """Where a job reads and writes: s3:// prefixes of buckets of its own."""

    source: str
    to: str

    def key(self, relative: str) -> Location:
        prefix = Location.parse(self.source)
        return Location(prefix.bucket, prefix.key + relative)

    def cutout(self, relative: str) -> Location:
        prefix = Location.parse(self.to)
        return Location(prefix.bucket, f"{prefix.key}cutouts/{relative}.png")

    def mask(self, relative: str) -> Location:
        prefix = Location.parse(self.to)
        return Location(prefix.bucket, f"{prefix.key}masks/{relative}.png")


WEBHOOK_SECRET = "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="  # noqa: S105


@dataclasses.dataclass
class Receiver:
    """Of webhooks. Answers with `statuses` in turn, then 200; keeps what was sent."""

    url: str
    statuses: list[int]
    got: list[tuple[Mapping[str, str], str]]

    def events(self) -> list[dict[str, Any]]:
        """What arrived, each with a signature that the receivers' library accepts."""
        return [Webhook(WEBHOOK_SECRET).verify(body, dict(headers)) for headers, body in self.got]


def sample_image(*, seed: int = 0, size: tuple[int, int] = (160, 120), form: str = "JPEG") -> bytes:
    """A bright disc on a noisy ground: something a model finds. `size`: width, height."""
    rng = np.random.default_rng(seed)
    width, height = size
    ground = Image.fromarray(rng.integers(20, 70, (height, width, 3), dtype=np.uint8))
    radius = min(size) // 3
    x, y = width // 2 + seed % 7 - 3, height // 2
    colour = (200 + seed % 50, 120, 40)
    ImageDraw.Draw(ground).ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    body = io.BytesIO()
    ground.save(body, form)
    return body.getvalue()


def s3_event(
    key: str,
    *,
    bucket: str = "shop",
    name: str = "ObjectCreated:Put",
    etag: str = "d41d8cd9",
    sequencer: str = "0A1B",
) -> Any:
    """As in AWS's "Event message structure", version 2.1; `key` as it is sent."""
    return {
        "Records": [
            {
                "eventVersion": "2.1",
                "eventSource": "aws:s3",
                "awsRegion": "us-west-2",
                "eventTime": "1970-01-01T00:00:00.000Z",
                "eventName": name,
                "userIdentity": {"principalId": "AIDAJDPLRKLG7UEXAMPLE"},
                "requestParameters": {"sourceIPAddress": "127.0.0.1"},
                "responseElements": {"x-amz-request-id": "C3D13FE58DE4C810"},
                "s3": {
                    "s3SchemaVersion": "1.0",
                    "configurationId": "testConfigRule",
                    "bucket": {
                        "name": bucket,
                        "ownerIdentity": {"principalId": "A3NL"},
                        "arn": f"arn:aws:s3:::{bucket}",
                    },
                    "object": {"key": key, "size": 1024, "eTag": etag, "sequencer": sequencer},
                },
            }
        ]
    }


def put_images(store: Store, places: Places, count: int, *, start: int = 0) -> list[str]:
    """Uploads `count` images; returns their names below the source."""
    names = [f"p{number:05d}.jpg" for number in range(start, start + count)]
    for number, name in enumerate(names, start):
        store.put(places.key(name), sample_image(seed=number), content_type="image/jpeg")
    return names


def program(name: str) -> str:
    """A program that a package of this environment brought, whatever PATH says."""
    return str(Path(sys.executable).with_name(name))


def decode(body: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(body))
    image.load()
    return image


def fetch(store: Store, location: Location) -> bytes:
    return store.get(location, role="output", max_bytes=500_000_000)[0]


def make(places: Places, ledger: Ledger, store: Store, *, count: int = 500, **more: Any) -> Job:
    """A backfill of `count` keys, unless `more` says otherwise."""
    keys = tuple(f"k{index:05d}.jpg" for index in range(count))
    fields = {"source": places.source, "destination": places.to, "recipe": Recipe(), "lane": "backfill", "name": ""}
    return submit(
        Request(**fields | {"keys": keys} | more), store=store, ledger=ledger, lease_s=60, listed=lambda _: None
    )


def wait_for_midnight() -> None:
    """When it is near, UTC: a watch makes a job a day, and a test that needs one begins behind it."""
    wait_until(lambda: 86_400 - time.time() % 86_400 > 60, within_s=90, what="midnight is over")


def wait_until(is_so: Callable[[], bool], *, within_s: float = 60, what: str = "the condition") -> None:
    """Polls; fails with `what` when the time is up."""
    deadline = time.monotonic() + within_s
    while True:
        is_late = time.monotonic() > deadline  # before the look: this process may stand still between the two
        if is_so():
            return
        if is_late:
            raise AssertionError(f"not within {within_s:g} s: {what}")
        time.sleep(0.05)
