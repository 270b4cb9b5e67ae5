"""Event bodies as their senders document them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from producer.ingest.notifications import Arrival, BadEvent, arrivals_of, newest
from tests.support.factories import s3_event


@pytest.mark.parametrize(
    ("sent", "key"),
    [
        ("happy+face.jpg", "happy face.jpg"),
        ("a%2Bb%25.jpg", "a+b%.jpg"),
        ("%D1%84%D0%BE%D1%82%D0%BE/%E9%9E%8B.jpg", "фото/鞋.jpg"),
    ],
)
def test_keys_of_s3_are_url_encoded(sent: str, key: str) -> None:
    assert arrivals_of(json.dumps(s3_event(sent))) == [Arrival("shop", key, "d41d8cd9", 1024, "0A1B")]


def test_what_sns_wraps_is_unwrapped() -> None:
    body = {"Type": "Notification", "TopicArn": "arn:aws:sns:x", "Message": json.dumps(s3_event("a.jpg"))}

    assert [arrival.key for arrival in arrivals_of(json.dumps(body))] == ["a.jpg"]


def test_minio_sends_what_s3_sends() -> None:
    body = {"EventName": "s3:ObjectCreated:Put", "Key": "shop/a b.jpg"}
    body |= s3_event("a+b.jpg", name="s3:ObjectCreated:Put")

    assert arrivals_of(json.dumps(body)) == [Arrival("shop", "a b.jpg", "d41d8cd9", 1024, "0A1B")]


def test_keys_of_eventbridge_are_as_they_are() -> None:
    body = {
        "version": "0",
        "id": "17793124-05d4-b198-2fde-7ededc63b103",
        "detail-type": "Object Created",
        "source": "aws.s3",
        "time": "2021-11-12T00:00:00Z",
        "detail": {
            "version": "0",
            "bucket": {"name": "shop"},
            "object": {"key": "a+b%20.jpg", "size": 5, "etag": "b1946ac9", "sequencer": "00617F08299329D189"},
            "reason": "PutObject",
        },
    }

    assert arrivals_of(json.dumps(body)) == [Arrival("shop", "a+b%20.jpg", "b1946ac9", 5, "00617F08299329D189")]


@pytest.mark.parametrize(
    "body",
    [
        s3_event("a.jpg", name="ObjectRemoved:Delete"),
        {"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "shop"},
        {"detail-type": "Object Deleted", "detail": {"bucket": {"name": "shop"}, "object": {"key": "a.jpg"}}},
        {"event_type": "delete", "key": "/buckets/shop/a.jpg", "message": {"old_entry": {"name": "a.jpg"}}},
        {
            "event_type": "create",
            "key": "/buckets/shop/folder",
            "message": {"new_entry": {"name": "folder", "is_directory": True}, "new_parent_path": "/buckets/shop"},
        },
        {
            "event_type": "create",
            "key": "/buckets/shop/.uploads/1/0001.part",
            "message": {
                "new_entry": {"name": "0001.part", "attributes": {}},
                "new_parent_path": "/buckets/shop/.uploads/1",
            },
        },
    ],
)
def test_what_tells_of_no_new_object_is_no_arrival(body: Any) -> None:
    assert arrivals_of(json.dumps(body)) == []


@pytest.mark.parametrize(
    "body",
    [
        *["", "[]", "{}", '"text"', '{"Records": [{}]}', '{"Records": 1}', json.dumps(s3_event("%ff.jpg")), "\x00"],
        pytest.param(json.dumps(s3_event("a.jpg")).replace("1024", "1e999"), id="a size without end"),
        pytest.param(json.dumps(s3_event("a.jpg", etag="\ud800")), id="an ETag that is no text"),
        pytest.param("[" * 100_000, id="deeper than Python goes"),
    ],
)
def test_what_is_no_notification_is_refused(body: str) -> None:
    with pytest.raises(BadEvent):
        arrivals_of(body)


def test_of_several_versions_the_newest_counts() -> None:
    one, two = Arrival("shop", "a.jpg", "1", 1, "00FF"), Arrival("shop", "a.jpg", "2", 1, "00FF01")
    unknown = Arrival("shop", "a.jpg", "3", 1)

    assert newest([two, one]) == newest([one, two]) == [two]
    assert newest([two, unknown]) == [unknown]
    assert len(newest([one, Arrival("shop", "b.jpg", "1", 1)])) == 2
