"""Checks of a request's locations before anything is submitted."""

from __future__ import annotations

import pytest

from jobs.errors import SettingsError
from jobs.recipe import Recipe, Rendition
from jobs.s3.client import Account, Store
from jobs.s3.location import Location, parse_destination
from producer.submission.validation import check_lengths, check_no_overlap

KEYS = ("a", "b", "us-east-1")


def check(source: str, to: str, path: str = "", *, elsewhere: bool = False) -> None:
    """`path`: of a rendition. `elsewhere`: the source is in another store."""
    account = Account("http://127.0.0.1:7", KEYS) if elsewhere else None
    recipe = Recipe(renditions=(Rendition(name="web", path=path),) if path else ())
    with Store("http://127.0.0.1:9", connections=1, credentials=KEYS, source=account) as store:
        check_no_overlap(Location.parse(source), parse_destination(to), recipe=recipe, store=store)


@pytest.mark.parametrize(
    ("source", "to", "path"),
    [
        ("s3://b/", "s3://b/out/", ""),
        ("s3://b/cutouts/", "s3://b/", ""),
        ("s3://b/cut", "s3://b/", ""),
        ("s3://b/cutouts/shoes/", "s3://b/", ""),
        ("s3://b/out/masks/", "s3://b/out", ""),
        ("s3://b/_cutfleet/", "s3://b/", ""),
        ("s3://b/web/", "s3://b/", "{rendition}/{path}.jpg"),
        ("s3://b/shop/web", "s3://b/shop/", "web/small/{path}.jpg"),
        ("s3://b/shop/p", "s3://b/shop/", "{path}.jpg"),
    ],
)
def test_a_job_that_would_read_its_own_outputs_is_refused(source: str, to: str, path: str) -> None:
    with pytest.raises(SettingsError) as refused:
        check(source, to, path)

    assert refused.value.code == "destination_under_source"


@pytest.mark.parametrize(
    ("source", "to", "path"),
    [
        ("s3://b/photos/", "s3://b/", ""),
        ("s3://b/photos/", "s3://b/", "web/{path}.jpg"),
        ("s3://b/photos/", "s3://b/", "{path}.jpg"),
        ("s3://b/web/", "s3://b/", ""),
        ("s3://b/cutouts/", "s3://b/again/", ""),
        ("s3://b/cutouts/", "s3://c/", ""),
    ],
)
def test_one_bucket_may_hold_sources_and_outputs(source: str, to: str, path: str) -> None:
    check(source, to, path)


def test_a_bucket_of_the_same_name_in_another_store_is_another_bucket() -> None:
    check("s3://b/cutouts/", "s3://b/", elsewhere=True)


def test_a_destination_leaves_room_for_names_below_it_in_bytes() -> None:
    check_lengths(Location("b", "k" * 1024), parse_destination("s3://c/" + "d" * 872))

    for source, to in [("k" * 1025, "d"), ("é" * 513, "d"), ("k", "d" * 873), ("k", "é" * 437)]:
        with pytest.raises(SettingsError) as refused:
            check_lengths(Location("b", source), parse_destination(f"s3://c/{to}"))
        assert refused.value.code == "name_too_long"
