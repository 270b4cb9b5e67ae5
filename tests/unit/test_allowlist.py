"""Allowlists compare prefixes character by character, and refuse parent segments."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from jobs.allowlist import Allowlist, is_allowed, parse_prefixes
from jobs.errors import OutputError, SourceError
from jobs.s3.client import Store
from jobs.s3.location import Location
from jobs.settings import Settings
from producer.api.auth import ApiKey, Forbidden

ALLOWED = ("s3://photos/a/", "s3://shop/")
API_KEY = ApiKey("shop", ALLOWED, ALLOWED, per_minute=1)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://photos/a/",
        "s3://photos/a/x.jpg",
        "s3://photos/a//x.jpg",
        "s3://photos/a/...jpg",
        "s3://photos/a/x..y/z.jpg",
        "s3://photos/a/%2e%2e/x.jpg",
        "s3://photos/a/ b+c,é.jpg",
        "s3://shop/",
        "s3://shop/anything/at/all.jpg",
    ],
)
def test_a_name_below_an_entry_is_allowed(uri: str) -> None:
    assert is_allowed(uri, ALLOWED)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://photos/",
        "s3://photos/a",
        "s3://photos/ab/x.jpg",
        "s3://photos/A/x.jpg",
        "s3://photos//a/x.jpg",
        "s3://photos/./a/x.jpg",
        "s3://photos/%61/x.jpg",
        "s3://photos/a%2Fx.jpg",
        "s3://photos/b/../a/x.jpg",
        "s3://photos/a/..",
        "s3://photos/a/../b/x.jpg",
        "s3://photos/a//../b/x.jpg",
        "s3://photos/a/..\\b\\x.jpg",
        "s3://photos/a/\\../b/x.jpg",
        "s3://photos-2/a/x.jpg",
        "s3://shop-2/x.jpg",
        "s3://shop/../photos/x.jpg",
    ],
)
def test_a_name_that_only_resembles_an_entry_is_refused(uri: str) -> None:
    assert not is_allowed(uri, ALLOWED)
    for check in (API_KEY.check_source, API_KEY.check_destination):
        with pytest.raises(Forbidden):
            check(Location.parse(uri))


def test_a_bucket_without_a_slash_is_refused() -> None:
    assert not is_allowed("s3://shop", ALLOWED)


def test_an_empty_allowlist_allows_everything() -> None:
    assert parse_prefixes("") == parse_prefixes("  ") == ()
    assert is_allowed("s3://any/../thing", ())


def test_entries_are_separated_by_commas_and_may_contain_some() -> None:
    assert parse_prefixes("s3://photos/,s3://shop/new/, s3://shop/a,b/ ") == (
        "s3://photos/",
        "s3://shop/new/",
        "s3://shop/a,b/",
    )


@pytest.mark.parametrize(
    "text",
    [
        "s3://photos",
        "s3://photos/a",
        "s3://photos/*",
        "photos/",
        "s3:///a/",
        "s3://photos/../b/",
        "s3://photos/,",
        ",",
        "s3://photos/,,s3://shop/",
        "s3://photos/,shop/new",
        "s3://photos/;s3://shop",
    ],
)
def test_a_malformed_entry_is_reported_with_its_variable(text: str) -> None:
    with pytest.raises(ValidationError, match="ends with a slash") as caught:
        Settings(sources=text)

    assert caught.value.errors()[0]["loc"] == ("sources",)


def test_a_store_sends_no_request_outside_its_allowlist() -> None:
    """No server listens at the endpoint: a request would raise another error."""
    allowlist = Settings(sources="s3://photos/a/", destinations="s3://results/a/").allowlist
    assert allowlist == Allowlist(("s3://photos/a/",), ("s3://results/a/",))
    photo, result = Location("photos", "b/x.jpg"), Location("results", "b/x.jpg")
    with Store("http://127.0.0.1:9", connections=1, credentials=("a", "b", "us-east-1"), allowlist=allowlist) as store:
        with pytest.raises(SourceError, match="CUTFLEET_SOURCES") as caught:
            store.get(photo, role="source", max_bytes=1)
        assert caught.value.code == "source_not_allowed"
        for call in (
            lambda: store.head(result, role="output"),
            lambda: store.get(result, role="output", max_bytes=1),
            lambda: store.put(result, b"", content_type="image/png"),
            lambda: store.supports_conditional_writes(result, b""),
            lambda: list(store.list_pages(Location("results", ""), role="output")),
            lambda: store.presign(result, lasts_s=60),
        ):
            with pytest.raises(OutputError, match="CUTFLEET_DESTINATIONS") as refused:
                call()
            assert refused.value.code == "output_not_allowed"
