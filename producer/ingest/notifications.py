"""What stores say when an object is put: the bodies of their event notifications, as arrivals.

  S3 notification   {"Records": [{"eventName": "ObjectCreated:Put", "s3": {...}}]}; keys are URL-encoded. By SQS, or
                    wrapped by SNS ({"Type": "Notification", "Message": "..."}); MinIO sends the same by webhook
  EventBridge       {"detail-type": "Object Created", "detail": {"bucket": ..., "object": ...}}; keys as they are
  SeaweedFS filer   {"key": "/buckets/BUCKET/KEY", "event_type": "create", "message": {"new_entry": ...}}
Deletions, folders, test events and whatever else says of no new object are no arrivals.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote_plus

from jobs.errors import CutfleetError

_SEAWEEDFS_BUCKETS = "/buckets/"


class BadEvent(CutfleetError):
    """A body that is none of the forms above."""

    code = "bad_event"


@dataclasses.dataclass(frozen=True)
class Arrival:
    """An object that was put. `etag` without quotes, empty: not said. `size` -1: not said. `sequencer`: of two events
    of one key the later has the greater, padded on the right with zeros; empty: not said."""

    bucket: str
    key: str
    etag: str
    size: int
    sequencer: str = ""


def arrivals_of(body: str | bytes) -> list[Arrival]:
    """Raises `BadEvent` when the body is no notification of a kind that is known."""
    try:
        found = list(_arrivals(json.loads(body)))
        for arrival in found:
            f"{arrival.bucket}{arrival.key}{arrival.etag}".encode()  # text that S3 could hold
        return found
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as exc:
        raise BadEvent(f"Not an event notification of S3, EventBridge, MinIO or SeaweedFS: {exc!r}.") from exc


def newest(arrivals: Iterable[Arrival]) -> list[Arrival]:
    """One arrival a key: the later by sequencer, else the one that came last."""
    found: dict[tuple[str, str], Arrival] = {}
    for arrival in arrivals:
        before = found.get((arrival.bucket, arrival.key))
        if before is None or not _is_later(before, arrival):
            found[arrival.bucket, arrival.key] = arrival
    return list(found.values())


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
                yield _from_s3(record["s3"])
    elif "detail-type" in event:
        if event["detail-type"] == "Object Created":
            yield _from_eventbridge(event["detail"])
    elif "event_type" in event:
        yield from _from_seaweedfs(event)
    elif event.get("Event") != "s3:TestEvent":
        raise KeyError("Records, detail-type or event_type")


def _from_s3(s3: Mapping[str, Any]) -> Arrival:
    found = s3["object"]
    return Arrival(
        s3["bucket"]["name"],
        unquote_plus(found["key"], errors="strict"),
        str(found.get("eTag", "")).strip('"'),
        int(found.get("size", -1)),
        str(found.get("sequencer", "")),
    )


def _from_eventbridge(detail: Mapping[str, Any]) -> Arrival:
    found = detail["object"]
    return Arrival(
        detail["bucket"]["name"],
        str(found["key"]),
        str(found.get("etag", "")).strip('"'),
        int(found.get("size", -1)),
        str(found.get("sequencer", "")),
    )


def _from_seaweedfs(event: Mapping[str, Any]) -> Iterator[Arrival]:
    """The filer tells of files: only those under its buckets are objects, and what multipart uploads put aside are
    none. An ETag that is not kept with the entry is left for a HEAD to find."""
    entry = event["message"].get("new_entry")
    path = event["message"].get("new_parent_path", "") + "/" + (entry or {}).get("name", "")
    bucket, _, key = path.removeprefix(_SEAWEEDFS_BUCKETS).partition("/")
    if entry is None or entry.get("is_directory") or not path.startswith(_SEAWEEDFS_BUCKETS) or not key:
        return
    if bucket.startswith(".") or key.startswith(".uploads/"):
        return
    kept = base64.b64decode(entry.get("extended", {}).get("Seaweed-X-Amz-ETag", "")).decode()
    yield Arrival(bucket, key, kept, int(entry["attributes"].get("file_size", 0)))
