"""Names of objects, conditions on writes, and errors that say whose fault they are."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from jobs.errors import ImageError, OutputError, ServiceUnavailable, SettingsError, SourceError
from jobs.recipe import Delivery, Recipe
from jobs.s3.client import (
    ASK_FIRST_BYTES,
    Location,
    PreconditionFailed,
    Store,
    image_names,
    record_location,
    rendition_names,
)
from producer.demo.local_stack import LocalStack
from tests.support.factories import Places


@pytest.mark.parametrize(
    ("source", "key", "relative"),
    [
        ("s3://in/photos/", "photos/a.jpg", "a.jpg"),
        ("s3://in/photos/", "photos/2024/a.jpg", "2024/a.jpg"),
        ("s3://in/photos", "photos-old/a.jpg", "photos-old/a.jpg"),
        ("s3://in/photos/20", "photos/2024/a.jpg", "2024/a.jpg"),
        ("s3://in/", "a.jpg", "a.jpg"),
        ("s3://in", "deep/a b+%é.jpg", "deep/a b+%é.jpg"),
    ],
)
def test_names_are_relative_to_the_last_slash_of_the_prefix(source: str, key: str, relative: str) -> None:
    names = image_names(source, "s3://out/made", key)

    assert str(names.cutout) == f"s3://out/made/cutouts/{relative}.png"
    assert str(names.mask) == f"s3://out/made/masks/{relative}.png"


def test_two_formats_of_one_image_never_meet() -> None:
    assert image_names("s3://in/", "s3://out/", "a.jpg").cutout != image_names("s3://in/", "s3://out/", "a.png").cutout


def test_a_name_that_s3_could_not_hold_is_refused() -> None:
    with pytest.raises(OutputError, match="1024") as caught:
        rendition_names(Recipe(), "s3://in/", "s3://out/" + "d" * 100, "k" * 1000)

    assert caught.value.code == "name_too_long"


@pytest.mark.parametrize("uri", ["in/photos", "s3:/in", "s3://", "https://in/photos"])
def test_what_is_no_s3_location_is_refused(uri: str) -> None:
    with pytest.raises(SettingsError, match="s3://BUCKET/PREFIX"):
        Location.parse(uri)


def test_a_conditional_write_does_not_overwrite_what_came_meanwhile(store: Store, places: Places) -> None:
    place = places.cutout("a.jpg")
    first = store.put(place, b"1", content_type="text/plain", conditional=True)

    with pytest.raises(PreconditionFailed):
        store.put(place, b"2", content_type="text/plain", conditional=True)
    second = store.put(place, b"2", content_type="text/plain", replaces=first, conditional=True)
    with pytest.raises(PreconditionFailed):
        store.put(place, b"3", content_type="text/plain", replaces=first, conditional=True)

    assert store.get(place, role="output", max_bytes=9) == (b"2", second)
    assert store.honours_conditions(record_location(places.to, "j", "job.json"), b"{}")


@pytest.mark.parametrize("more", [0, 1])
def test_only_a_large_body_is_asked_for_first(more: int) -> None:
    asked: list[str | None] = []
    came: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            asked.append(self.headers["Expect"])
            came.append(len(self.rfile.read(int(self.headers["Content-Length"]))))
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
            store.put(Location("bucket", "a"), bytes(ASK_FIRST_BYTES + more), content_type="text/plain")

    assert (asked, came) == ([None, "100-continue"][more : more + 1], [ASK_FIRST_BYTES + more])


@pytest.mark.parametrize("size", [1, ASK_FIRST_BYTES, 4 * ASK_FIRST_BYTES])
def test_a_refused_write_is_told_as_such_however_large(store: Store, places: Places, size: int) -> None:
    place = places.cutout("a.jpg")
    store.put(place, bytes(size), content_type="text/plain", conditional=True)

    with pytest.raises(PreconditionFailed):
        store.put(place, bytes(size), content_type="text/plain", conditional=True)


def test_a_source_that_was_replaced_is_named_as_such(store: Store, places: Places) -> None:
    listed = store.put(places.key("a.jpg"), b"1", content_type="text/plain")
    store.put(places.key("a.jpg"), b"2", content_type="text/plain")

    with pytest.raises(SourceError) as caught:
        store.get(places.key("a.jpg"), role="source", etag=listed, max_bytes=9)

    assert caught.value.code == "source_changed"


def test_a_body_above_the_limit_is_refused_before_it_is_read(store: Store, places: Places) -> None:
    store.put(places.key("a.jpg"), b"x" * 1000, content_type="text/plain")

    with pytest.raises(ImageError, match="CUTFLEET_MAX_BYTES_MB") as caught:
        store.get(places.key("a.jpg"), role="source", max_bytes=999)

    assert caught.value.code == "too_many_bytes"


def test_listing_leaves_folder_markers_out_and_goes_on_behind_a_key(store: Store, places: Places) -> None:
    for name in ("b/z.jpg", "b/", "a b.jpg", "é.jpg", "b!.jpg"):
        store.put(places.key(name), b"x", content_type="text/plain")
    prefix = Location.parse(places.source)

    keys = [found.key for found in store.list_source(prefix)]

    assert sorted(keys) == sorted(["b/z.jpg", "a b.jpg", "é.jpg", "b!.jpg"])
    assert [found.key for found in store.list_source(prefix, after=keys[1])] == keys[2:]


def test_errors_say_whose_fault_they_are(store: Store, places: Places) -> None:
    nowhere = Location("no-such-bucket-here", "a")

    assert store.head(places.key("missing"), role="source") is None
    with pytest.raises(SourceError) as missing:
        store.get(places.key("missing"), role="source", max_bytes=9)
    with pytest.raises(SourceError) as no_source:
        list(store.list_source(nowhere))
    with pytest.raises(OutputError) as no_destination:
        store.put(nowhere, b"", content_type="text/plain")

    assert missing.value.code == "source_missing"
    assert no_source.value.code == no_destination.value.code == "bucket_missing"


def test_a_name_that_the_store_finds_too_long_is_no_fault_of_the_store(store: Store, places: Places) -> None:
    with pytest.raises(OutputError) as refused:
        store.put(places.cutout("k" * 1020), b"x", content_type="image/png")

    assert refused.value.code == "name_too_long"


def test_an_endpoint_that_is_not_there_is_named(stack: LocalStack) -> None:
    with (
        Store("http://127.0.0.1:9", connections=1, credentials=("a", "b", "us-east-1")) as store,
        pytest.raises(ServiceUnavailable, match=r"127\.0\.0\.1:9.*CUTFLEET_S3_ENDPOINT"),
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
def test_wrong_credentials_are_named_and_are_no_fault_of_the_object(
    stack: LocalStack, call: Callable[[Store], object]
) -> None:
    endpoint = stack.environment["CUTFLEET_S3_ENDPOINT"]
    with (
        Store(endpoint, connections=1, credentials=("nobody", "wrong", "us-east-1")) as store,
        pytest.raises(ServiceUnavailable, match="AWS_ACCESS_KEY_ID") as caught,
    ):
        call(store)

    assert caught.value.code == "store_denied"


def test_storage_class_cache_header_and_key_reach_the_store(aws: Store) -> None:
    delivery = Delivery(cache_control="max-age=60", storage_class="STANDARD_IA", kms_key="alias/images")
    place = Location("kept", "cutouts/a.jpg.png")
    aws.create_bucket(place.bucket)

    aws.put(place, b"x", content_type="image/png", delivery=delivery)

    kept = aws._s3.head_object(Bucket=place.bucket, Key=place.key)
    assert (kept["ServerSideEncryption"], kept["SSEKMSKeyId"]) == ("aws:kms", "alias/images")
    assert (kept["StorageClass"], kept["CacheControl"], kept["ContentType"]) == (
        "STANDARD_IA",
        "max-age=60",
        "image/png",
    )
