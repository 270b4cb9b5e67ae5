"""The store: conditional writes, limits, and errors that name the cause."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from jobs.errors import (
    ContentError,
    NotFound,
    OutputError,
    PreconditionFailed,
    SourceError,
    StoreUnavailable,
)
from jobs.recipe import Delivery
from jobs.s3.client import EXPECT_CONTINUE_BYTES, Account, Store
from jobs.s3.location import Location, parse_destination
from jobs.s3.names import record_path
from producer.demo.local_stack import LocalStack
from tests.support.places import Places


def test_a_conditional_write_overwrites_no_other_version(store: Store, places: Places) -> None:
    place = places.cutout("a.jpg")
    first = store.put(place, b"1", content_type="text/plain", conditional=True)

    with pytest.raises(PreconditionFailed):
        store.put(place, b"2", content_type="text/plain", conditional=True)
    second = store.put(place, b"2", content_type="text/plain", replaces=first, conditional=True)
    with pytest.raises(PreconditionFailed):
        store.put(place, b"3", content_type="text/plain", replaces=first, conditional=True)

    assert store.get(place, role="output", max_bytes=9) == (b"2", second)
    assert store.supports_conditional_writes(record_path(parse_destination(places.to), "j", "job.json"), b"{}")


@pytest.mark.parametrize("more", [0, 1])
def test_only_a_large_body_waits_for_100_continue(more: int) -> None:
    expects: list[str | None] = []
    sizes: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            expects.append(self.headers["Expect"])
            sizes.append(len(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("ETag", '"e"')
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request).start()
        store = Store(f"http://127.0.0.1:{server.server_port}", connections=1, credentials=("a", "b", "us-east-1"))
        with store:
            store.put(Location("bucket", "a"), bytes(EXPECT_CONTINUE_BYTES + more), content_type="text/plain")

    assert (expects, sizes) == ([None, "100-continue"][more : more + 1], [EXPECT_CONTINUE_BYTES + more])


@pytest.mark.parametrize("size", [1, EXPECT_CONTINUE_BYTES, 4 * EXPECT_CONTINUE_BYTES])
def test_a_conditional_write_of_any_size_is_refused(store: Store, places: Places, size: int) -> None:
    place = places.cutout("a.jpg")
    store.put(place, bytes(size), content_type="text/plain", conditional=True)

    with pytest.raises(PreconditionFailed):
        store.put(place, bytes(size), content_type="text/plain", conditional=True)


def test_a_replaced_source_is_an_error_of_the_source(store: Store, places: Places) -> None:
    listed = store.put(places.key("a.jpg"), b"1", content_type="text/plain")
    store.put(places.key("a.jpg"), b"2", content_type="text/plain")

    with pytest.raises(SourceError) as caught:
        store.get(places.key("a.jpg"), role="source", etag=listed, max_bytes=9)

    assert caught.value.code == "source_changed"


def test_a_body_above_the_limit_is_refused_before_it_is_read(store: Store, places: Places) -> None:
    store.put(places.key("a.jpg"), b"x" * 1000, content_type="text/plain")

    with pytest.raises(ContentError, match="CUTFLEET_MAX_BYTES_MB") as caught:
        store.get(places.key("a.jpg"), role="source", max_bytes=999)

    assert caught.value.code == "too_many_bytes"


def test_a_listing_omits_folder_markers_and_starts_after_a_key(store: Store, places: Places) -> None:
    for name in ("b/z.jpg", "b/", "a b.jpg", "é.jpg", "b!.jpg"):
        store.put(places.key(name), b"x", content_type="text/plain")
    prefix = Location.parse(places.source)

    keys = [found.key for found in store.list_source(prefix)]

    assert sorted(keys) == sorted(["b/z.jpg", "a b.jpg", "é.jpg", "b!.jpg"])
    assert [found.key for found in store.list_source(prefix, after=keys[1])] == keys[2:]


def test_an_error_names_source_or_output_as_its_cause(store: Store, places: Places) -> None:
    nowhere = Location("no-such-bucket-here", "a")

    assert store.head(places.key("missing"), role="source") is None
    with pytest.raises(NotFound) as missing:
        store.get(places.key("missing"), role="source", max_bytes=9)
    with pytest.raises(SourceError) as no_source:
        list(store.list_source(nowhere))
    with pytest.raises(OutputError) as no_destination:
        store.put(nowhere, b"", content_type="text/plain")

    assert isinstance(missing.value, SourceError) and missing.value.code == "source_missing"
    assert no_source.value.code == no_destination.value.code == "bucket_missing"


def test_a_name_too_long_for_the_store_is_an_error_of_the_output(store: Store, places: Places) -> None:
    with pytest.raises(OutputError) as refused:
        store.put(places.cutout("k" * 1020), b"x", content_type="image/png")

    assert refused.value.code == "name_too_long"


def test_an_unreachable_endpoint_is_named(stack: LocalStack) -> None:
    with (
        Store("http://127.0.0.1:9", connections=1, credentials=("a", "b", "us-east-1")) as store,
        pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:9.*CUTFLEET_S3_ENDPOINT"),
    ):
        store.head(Location("b", "k"), role="source")


@pytest.mark.parametrize(
    "call",
    [
        lambda store: list(store.list_source(Location("cutfleet-ready", ""))),
        lambda store: store.head(Location("cutfleet-ready", "k"), role="output"),
        lambda store: store.get(Location("cutfleet-ready", "k"), role="source", max_bytes=9),
        lambda store: store.put(Location("cutfleet-ready", "k"), b"", content_type="text/plain"),
    ],
    ids=["list", "head", "get", "put"],
)
def test_wrong_credentials_are_an_error_of_the_service_not_of_the_object(
    stack: LocalStack, call: Callable[[Store], object]
) -> None:
    endpoint = stack.environment["CUTFLEET_S3_ENDPOINT"]
    with (
        Store(endpoint, connections=1, credentials=("unknown", "wrong", "us-east-1")) as store,
        pytest.raises(StoreUnavailable, match="AWS_ACCESS_KEY_ID") as caught,
    ):
        call(store)

    assert caught.value.code == "store_denied"


def test_storage_class_cache_header_and_key_reach_the_store(aws: Store) -> None:
    delivery = Delivery(cache_control="max-age=60", storage_class="STANDARD_IA", kms_key="alias/images")
    place = Location("kept", "cutouts/a.jpg.png")
    aws.create_bucket(place.bucket)

    aws.put(place, b"x", content_type="image/png", delivery=delivery)

    client = Account(aws.name, ("a", "b", "us-east-1")).connect(1)
    kept = client.head_object(Bucket=place.bucket, Key=place.key)
    assert (kept["ServerSideEncryption"], kept["SSEKMSKeyId"]) == ("aws:kms", "alias/images")
    assert (kept["StorageClass"], kept["CacheControl"], kept["ContentType"]) == (
        "STANDARD_IA",
        "max-age=60",
        "image/png",
    )
