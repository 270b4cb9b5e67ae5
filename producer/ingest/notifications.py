"""Parses event notifications of stores: which objects were written.

  S3 notification   {"Records": [{"eventName": "ObjectCreated:Put", "s3": {...}}]}; keys are URL-encoded. By SQS, also
                    wrapped by SNS ({"Type": "Notification", "Message": "..."}); MinIO sends the same by webhook
  EventBridge       {"detail-type": "Object Created", "detail": {"bucket": ..., "object": ...}}; keys are not encoded
  SeaweedFS filer   {"key": "/buckets/BUCKET/KEY", "event_type": "create", "message": {"new_entry": ...}}

Deletions, folders, test events and other events without a new object give no arrival.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote_plus

from jobs.errors import CutfleetError
from jobs.s3.location import Location

_SEAWEEDFS_BUCKETS = "/buckets/"


class BadNotification(CutfleetError):
    """A body in none of the forms above."""

    code = "bad_event"


@dataclasses.dataclass(frozen=True)
class Arrival:
    """An object that was written. `etag` without quotes; empty if unknown. `size` -1 if unknown. `sequencer`: greater
    for the later of two events of one key, compared after padding with zeros on the right; empty if unknown."""

    location: Location
    etag: str
    size: int
    sequencer: str = ""


def parse_notification(body: str | bytes) -> list[Arrival]:
    """Raises `BadNotification`."""
    try:
        arrivals = list(_arrivals(json.loads(body)))
        for arrival in arrivals:
            f"{arrival.location}{arrival.etag}".encode()  # raises for text that S3 can't hold
        return arrivals
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as exc:
        raise BadNotification(f"Not an event notification of S3, EventBridge, MinIO or SeaweedFS: {exc!r}.") from exc


def keep_newest(arrivals: Iterable[Arrival]) -> list[Arrival]:
    """Return one arrival for each object: the later by sequencer, else the one that comes last."""
    newest: dict[Location, Arrival] = {}
    for arrival in arrivals:
        other = newest.get(arrival.location)
        if other is None or not _is_later(other, arrival):
            newest[arrival.location] = arrival
    return list(newest.values())


def _is_later(one: Arrival, other: Arrival) -> bool:
    width = max(len(one.sequencer), len(other.sequencer))
    return bool(one.sequencer and other.sequencer) and (
        one.sequencer.ljust(width, "0").upper() > other.sequencer.ljust(width, "0").upper()
    )


def _arrivals(event: Mapping[str, Any]) -> Iterator[Arrival]:
    if event.get("Type") == "Notification":
        yield from _arrivals(json.loads(event["Message"]))
    elif "Records" in event:
        for record in event["Records"]:
            if record["eventName"].removeprefix("s3:").startswith("ObjectCreated:"):
                key = unquote_plus(record["s3"]["object"]["key"], errors="strict")
                yield _arrival(record["s3"], key, etag_field="eTag")
    elif "detail-type" in event:
        if event["detail-type"] == "Object Created":
            yield _arrival(event["detail"], str(event["detail"]["object"]["key"]), etag_field="etag")
    elif "event_type" in event:
        yield from _from_seaweedfs(event)
    elif event.get("Event") != "s3:TestEvent":
        raise KeyError("Records, detail-type or event_type")


def _arrival(fields: Mapping[str, Any], key: str, *, etag_field: str) -> Arrival:
    found = fields["object"]
    etag = str(found.get(etag_field, "")).strip('"')
    location = Location(fields["bucket"]["name"], key)
    return Arrival(location, etag, int(found.get("size", -1)), str(found.get("sequencer", "")))


def _from_seaweedfs(event: Mapping[str, Any]) -> Iterator[Arrival]:
    """The filer reports files: only those under its buckets are objects, except parts of multipart uploads. If the
    entry has no ETag, the watcher asks the store."""
    entry = event["message"].get("new_entry")
    path = event["message"].get("new_parent_path", "") + "/" + (entry or {}).get("name", "")
    bucket, _, key = path.removeprefix(_SEAWEEDFS_BUCKETS).partition("/")
    if entry is None or entry.get("is_directory") or not path.startswith(_SEAWEEDFS_BUCKETS) or not key:
        return
    if bucket.startswith(".") or key.startswith(".uploads/"):
        return
    etag = base64.b64decode(entry.get("extended", {}).get("Seaweed-X-Amz-ETag", "")).decode()
    yield Arrival(Location(bucket, key), etag, int(entry["attributes"].get("file_size", 0)))
