"""Allow-lists of places: exact at the borders of prefixes, and nothing gets by in disguise."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from jobs.allowlist import Bounds, is_within, parse_prefixes
from jobs.errors import OutputError, SourceError
from jobs.s3.client import Location, Store
from jobs.settings import Settings
from producer.api.auth import Caller, Forbidden

ALLOWED = ("s3://photos/a/", "s3://shop/")


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
def test_what_begins_with_an_entry_is_allowed_letter_by_letter(uri: str) -> None:
    assert is_within(uri, ALLOWED)


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
        "s3://shop",
        "s3://shop/../photos/x.jpg",
    ],
)
def test_what_only_looks_like_an_entry_is_not(uri: str) -> None:
    assert not is_within(uri, ALLOWED)
    with pytest.raises(Forbidden):
        Caller("shop", ALLOWED, ALLOWED, 1).check(source=uri)


def test_without_a_list_everything_is_allowed() -> None:
    assert parse_prefixes("") == parse_prefixes("  ") == ()
    assert is_within("s3://any/../thing", ())


def test_entries_stand_between_commas_and_may_hold_some() -> None:
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
def test_an_entry_that_would_allow_more_or_nothing_is_refused_by_its_variable(text: str) -> None:
    with pytest.raises(ValidationError, match="ends with a slash") as caught:
        Settings(sources=text)

    assert caught.value.errors()[0]["loc"] == ("sources",)


def test_a_store_touches_nothing_outside_whatever_is_asked_of_it() -> None:
    """Nobody listens at its endpoint: what is refused was not even sent."""
    bounds = Settings(sources="s3://photos/a/", destinations="s3://results/a/").bounds
    assert bounds == Bounds(("s3://photos/a/",), ("s3://results/a/",))
    photo, result = Location("photos", "b/x.jpg"), Location("results", "b/x.jpg")
    with Store("http://127.0.0.1:9", connections=1, credentials=("a", "b", "us-east-1"), bounds=bounds) as store:
        with pytest.raises(SourceError, match="CUTFLEET_SOURCES") as caught:
            store.get(photo, role="source", max_bytes=1)
        assert caught.value.code == "source_not_allowed"
        for call in (
            lambda: store.head(result, role="output"),
            lambda: store.get(result, role="output", max_bytes=1),
            lambda: store.put(result, b"", content_type="image/png"),
            lambda: store.honours_conditions(result, b""),
            lambda: list(store.list_pages(Location("results", ""), role="output")),
            lambda: store.presign(result, lasts_s=60),
        ):
            with pytest.raises(OutputError, match="CUTFLEET_DESTINATIONS") as refused:
                call()
            assert refused.value.code == "output_not_allowed"
