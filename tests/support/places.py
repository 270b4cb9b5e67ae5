"""Where a test's job reads and writes, and what is there."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from jobs.s3.client import Account, Store
from jobs.s3.location import Location, parse_destination
from producer.demo.local_stack import ACCESS_KEY, SECRET_KEY

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


@dataclasses.dataclass(frozen=True)
class Places:
    """s3:// prefixes of one job, as a person writes them. `to`: the destination."""

    source: str
    to: str

    @property
    def source_location(self) -> Location:
        return Location.parse(self.source)

    @property
    def destination(self) -> Location:
        return parse_destination(self.to)

    def key(self, relative: str) -> Location:
        """Return the location of a source."""
        return self.source_location.below(relative)

    def cutout(self, relative: str) -> Location:
        return self.destination.below(f"cutouts/{relative}.png")

    def mask(self, relative: str) -> Location:
        return self.destination.below(f"masks/{relative}.png")


def create_places(store: Store, name: str) -> Places:
    """Create a source and a destination bucket. `name`: unique in this store."""
    places = Places(f"s3://source-{name}/", f"s3://results-{name}/")
    for location in (places.source_location, places.destination):
        store.create_bucket(location.bucket)
    return places


@contextlib.contextmanager
def plain_client(store: Store) -> Iterator[S3Client]:
    """Yield a boto3 client of the local server of `store`, for requests that `Store` does not make."""
    account = Account(store.name, credentials=(ACCESS_KEY, SECRET_KEY, "us-east-1"))
    with contextlib.closing(account.connect(connections=4)) as client:
        yield client


def delete_object(store: Store, location: Location) -> None:
    with plain_client(store) as client:
        client.delete_object(Bucket=location.bucket, Key=location.key)


def fetch_output(store: Store, location: Location) -> bytes:
    return store.get(location, role="output", max_bytes=500_000_000)[0]
