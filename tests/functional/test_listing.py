"""Parallel listings are exact for any folders; listings find archived objects."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from jobs.errors import SourceError
from jobs.job import ImageState
from jobs.ledger import Ledger
from jobs.recipe import Recipe
from jobs.s3 import listing
from jobs.s3.client import S3Object, Store
from jobs.s3.errors import Role
from jobs.s3.listing import list_in_parallel
from jobs.s3.location import Location
from producer.demo.local_stack import LocalStack
from producer.dispatcher.feeder import Feeder
from producer.dispatcher.job_backoff import JobBackoff
from producer.submission.request import Request
from producer.submission.submit import submit
from tests.support.places import Places, plain_client

if TYPE_CHECKING:
    from mypy_boto3_s3.literals import StorageClassType

Pages = Iterator[tuple[list[S3Object], list[str]]]


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.s3.client.PAGE_KEYS", 5)
    monkeypatch.setattr(listing, "PAGE_KEYS", 5)
    monkeypatch.setattr(listing, "MIN_FOLDER_OBJECTS", 2)
    monkeypatch.setattr(listing, "LISTERS", 4)
    monkeypatch.setattr(listing, "ENOUGH_UNITS", 30)


class RecordingStore(Store):
    """Records the prefixes that are listed, and the threads that list them."""

    def __init__(self, stack: LocalStack) -> None:
        endpoint = stack.environment["CUTFLEET_S3_ENDPOINT"]
        super().__init__(endpoint, connections=16, credentials=(*stack.keys, "us-east-1"))
        self.prefixes: list[str] = []
        self.threads: set[int] = set()

    def list_pages(self, prefix: Location, *, role: Role, delimiter: str = "", after: str = "") -> Pages:
        self.prefixes.append(prefix.key + ("|" if delimiter else ""))
        for page in super().list_pages(prefix, role=role, delimiter=delimiter, after=after):
            self.threads.add(threading.get_ident())
            yield page


TREE = [
    *(f"a/{number:02d}.jpg" for number in range(17)),
    *(f"b/{folder}/{number}.jpg" for folder in range(12) for number in range(6)),
    *(f"c/d/e/{number:02d}.jpg" for number in range(11)),
    *(f"one-a-folder/{number:02d}/x.jpg" for number in range(13)),
    "a.jpg",
    "b b+%é/ключ 1.jpg",
    "z.jpg",
]


def test_each_object_of_any_tree_is_listed_once(
    stack: LocalStack, store: Store, places: Places, small_pages: None
) -> None:
    prefix = places.source_location
    for name in random.Random(5).sample(TREE, len(TREE)):
        store.put(places.key(name), b"x", content_type="image/jpeg")
    recording = RecordingStore(stack)

    keys = [found.key for found in list_in_parallel(recording, prefix, role="source")]

    assert sorted(keys) == sorted(TREE)
    assert {"b/3/", "c/d/e/"} <= set(recording.prefixes), "large folders are listed on their own"
    assert not any(name.startswith("one-a-folder/0") for name in recording.prefixes), "small folders are not"
    assert len(recording.threads) > 1
    under = Location(prefix.bucket, "b")
    assert sorted(found.key for found in list_in_parallel(store, under, role="source")) == sorted(
        name for name in TREE if name.startswith("b")
    )


def test_a_small_prefix_costs_one_request(stack: LocalStack, store: Store, places: Places) -> None:
    store.put(places.key("a/1.jpg"), b"x", content_type="image/jpeg")
    recording = RecordingStore(stack)

    assert len(list(list_in_parallel(recording, places.source_location, role="source"))) == 1
    assert recording.prefixes == [""]


def test_a_listing_that_fails_or_is_closed_early_leaves_no_thread(
    stack: LocalStack, store: Store, places: Places, small_pages: None
) -> None:
    for name in TREE:
        store.put(places.key(name), b"x", content_type="image/jpeg")
    prefix = places.source_location

    class Failing(RecordingStore):
        def list_pages(self, prefix: Location, *, role: Role, delimiter: str = "", after: str = "") -> Pages:
            if prefix.key == "b/7/":
                raise SourceError("no", code="source_denied")
            return super().list_pages(prefix, role=role, delimiter=delimiter, after=after)

    with pytest.raises(SourceError):
        list(list_in_parallel(Failing(stack), prefix, role="source"))
    keys = list_in_parallel(store, prefix, role="source")
    next(keys)
    keys.close()  # type: ignore[attr-defined]  # it is a generator

    assert not [thread for thread in threading.enumerate() if thread.name == "listing"]


def test_archived_sources_fail_without_a_worker(stack: LocalStack, aws: Store) -> None:
    source, to = Location("images", ""), Location("results", "")
    for location in (source, to):
        aws.create_bucket(location.bucket)
    classes: dict[str, StorageClassType] = {
        "a.jpg": "GLACIER",
        "b.jpg": "STANDARD",
        "c.jpg": "DEEP_ARCHIVE",
        "d.jpg": "GLACIER_IR",
    }
    with plain_client(aws) as client:
        for key, storage_class in classes.items():
            client.put_object(Bucket="images", Key=key, Body=b"x", StorageClass=storage_class)

    listed = {found.key: found.hint for found in list_in_parallel(aws, source, role="source")}
    assert listed == {"a.jpg": "archived", "b.jpg": "", "c.jpg": "archived", "d.jpg": ""}
    request = Request(
        source=source, destination=to, recipe=Recipe(model="birefnet"), lane="backfill", name="", keys=None
    )
    with Ledger(stack.environment["CUTFLEET_REDIS_URL"].replace("/0", "/4"), name="own") as ledger:
        aws.put(Location("results", "cutouts/c.jpg.png"), b"made before", content_type="image/png")
        job = submit(request, store=aws, ledger=ledger, lease_s=60, listed=lambda _: None)
        epoch = ledger.dispatch.lead("test", ttl_s=60)
        assert epoch is not None
        Feeder(ledger, aws, lease_s=60, backoff=JobBackoff()).feed(epoch, [job])

        failures = {failure.key: failure.code for _, failure in ledger.images.failures(job.id)}
        after = ledger.jobs.get(job.id)
        assert failures == {"a.jpg": "source_archived"}, "c.jpg may be done already: a worker checks"
        assert (after.cursor, after.failed, after.window) == (4, 1, 3)
        states = ledger.images.states(job.id, 0, 4)
        assert states.count(ImageState.FAILED) == 1


def test_a_restored_object_does_not_count_as_archived() -> None:
    """With the answer that AWS documents; no test server gives it."""
    requested: list[str | None] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requested.append(self.headers.get("x-amz-optional-object-attributes"))
            body = _RESTORED.encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        with Store(url, connections=2, credentials=("a", "b", "us-east-1")) as store:
            listed = {found.key: found.hint for found in store.list_source(Location("b", ""))}
    finally:
        server.shutdown()
        server.server_close()

    assert listed == {"restored.jpg": "", "being-restored.jpg": "archived"}
    assert requested == ["RestoreStatus"]


_RESTORED = """<?xml version="1.0" encoding="UTF-8"?>
<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">
<Name>b</Name><Prefix/><KeyCount>2</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>
<Contents><Key>restored.jpg</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>"e"</ETag><Size>1</Size>
<RestoreStatus><IsRestoreInProgress>false</IsRestoreInProgress>
<RestoreExpiryDate>2036-01-01T00:00:00.000Z</RestoreExpiryDate></RestoreStatus>
<StorageClass>GLACIER</StorageClass></Contents>
<Contents><Key>being-restored.jpg</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>"e"</ETag><Size>1</Size>
<RestoreStatus><IsRestoreInProgress>true</IsRestoreInProgress></RestoreStatus>
<StorageClass>DEEP_ARCHIVE</StorageClass></Contents>
</ListBucketResult>"""
