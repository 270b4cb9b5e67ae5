"""Event notifications, in the forms that their senders document."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jobs.s3.location import Location
from producer.ingest.notifications import Arrival, BadNotification, keep_newest, parse_notification
from tests.support.s3_events import s3_event


def arrival(key: str, etag: str = "d41d8cd9", size: int = 1024, sequencer: str = "0A1B") -> Arrival:
    return Arrival(Location("shop", key), etag, size, sequencer)


@pytest.mark.parametrize(
    ("sent", "key"),
    [
        ("happy+face.jpg", "happy face.jpg"),
        ("a%2Bb%25.jpg", "a+b%.jpg"),
        ("%D1%84%D0%BE%D1%82%D0%BE/%E9%9E%8B.jpg", "фото/鞋.jpg"),
    ],
)
def test_keys_of_s3_are_url_decoded(sent: str, key: str) -> None:
    assert parse_notification(json.dumps(s3_event(sent))) == [arrival(key)]


def test_a_notification_wrapped_by_sns_is_unwrapped() -> None:
    body = {"Type": "Notification", "TopicArn": "arn:aws:sns:x", "Message": json.dumps(s3_event("a.jpg"))}

    assert parse_notification(json.dumps(body)) == [arrival("a.jpg")]


def test_minio_sends_the_form_of_s3() -> None:
    body = {"EventName": "s3:ObjectCreated:Put", "Key": "shop/a b.jpg"}
    body |= s3_event("a+b.jpg", name="s3:ObjectCreated:Put")

    assert parse_notification(json.dumps(body)) == [arrival("a b.jpg")]


def test_keys_of_eventbridge_are_not_decoded() -> None:
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

    assert parse_notification(json.dumps(body)) == [arrival("a+b%20.jpg", "b1946ac9", 5, "00617F08299329D189")]


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
def test_an_event_without_a_new_object_gives_no_arrival(body: Any) -> None:
    assert parse_notification(json.dumps(body)) == []


@pytest.mark.parametrize(
    "body",
    [
        *["", "[]", "{}", '"text"', '{"Records": [{}]}', '{"Records": 1}', json.dumps(s3_event("%ff.jpg")), "\x00"],
        pytest.param(json.dumps(s3_event("a.jpg")).replace("1024", "1e999"), id="infinite size"),
        pytest.param(json.dumps(s3_event("a.jpg", etag="\ud800")), id="ETag that is not UTF-8"),
        pytest.param("[" * 100_000, id="nested deeper than Python's recursion limit"),
    ],
)
def test_any_other_body_is_refused(body: str) -> None:
    with pytest.raises(BadNotification):
        parse_notification(body)


def test_the_newest_of_several_versions_is_kept() -> None:
    one, two = arrival("a.jpg", "1", sequencer="00FF"), arrival("a.jpg", "2", sequencer="00FF01")
    unnumbered = arrival("a.jpg", "3", sequencer="")

    assert keep_newest([two, one]) == keep_newest([one, two]) == [two]
    assert keep_newest([two, unnumbered]) == [unnumbered]
    assert len(keep_newest([one, arrival("b.jpg")])) == 2
