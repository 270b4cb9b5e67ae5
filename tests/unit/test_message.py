"""What a message may say, and what is said of one that can't be read."""

from __future__ import annotations

import pytest

from jobs.message import BadMessage, ImageTask, LaterMessage

VERSION_1 = {
    "v": 1,
    "job": "20260101-000000-abcdef",
    "index": 3,
    "key": "a/b.jpg",
    "etag": "e",
    "size": 10,
    "lane": "live",
}


def test_a_stored_message_of_version_1_decodes() -> None:
    task = ImageTask.from_fields(VERSION_1)

    assert task == ImageTask("20260101-000000-abcdef", 3, "a/b.jpg", "e", 10, "live")
    assert task.to_fields() == VERSION_1


def test_a_hint_is_said_only_where_there_is_one() -> None:
    hinted = ImageTask.from_fields({**VERSION_1, "hint": "new"})

    assert hinted.to_fields() == {**VERSION_1, "hint": "new"}


def test_a_field_that_is_added_later_is_ignored() -> None:
    assert ImageTask.from_fields({**VERSION_1, "later": True}).index == 3


def test_a_message_of_a_later_version_is_told_from_a_bad_one() -> None:
    with pytest.raises(LaterMessage, match="version 2; this worker reads 1: update it"):
        ImageTask.from_fields({**VERSION_1, "v": 2, "lane": "a lane of later"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("v", 0),
        ("v", None),
        ("v", "2"),
        ("job", "no job; rm"),
        ("job", 7),
        ("index", -1),
        ("index", True),
        ("index", 2**40),
        ("key", ""),
        ("key", "k" * 1025),
        ("key", "é" * 513),
        ("key", "half a pair \ud800"),
        ("etag", None),
        ("size", -2),
        ("lane", "fast"),
        ("hint", "old"),
    ],
)
def test_a_message_with_a_wrong_field_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(BadMessage, match=r"version|" + name):
        ImageTask.from_fields({**VERSION_1, name: value})
