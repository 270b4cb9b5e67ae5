"""Messages: versions, fields, and queues."""

from __future__ import annotations

import pytest

from jobs.message import BadMessage, ImageTask, LaterMessage, worker_queues

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


def test_a_hint_is_written_only_if_there_is_one() -> None:
    hinted = ImageTask.from_fields({**VERSION_1, "hint": "new"})

    assert hinted.to_fields() == {**VERSION_1, "hint": "new"}


def test_a_field_of_a_later_version_is_ignored() -> None:
    assert ImageTask.from_fields({**VERSION_1, "later": True}).index == 3


def test_a_message_of_a_later_version_is_not_a_bad_one() -> None:
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
def test_an_invalid_field_is_named(name: str, value: object) -> None:
    with pytest.raises(BadMessage, match=r"version|" + name):
        ImageTask.from_fields({**VERSION_1, name: value})


def test_live_is_consumed_before_backfill_and_each_model_has_its_own_queues() -> None:
    assert worker_queues("u2netp") == ["live.u2netp", "suspect.u2netp", "backfill.u2netp"]
    assert worker_queues("m", renders=True)[:4] == ["live.render", "live.m", "suspect.render", "suspect.m"]
