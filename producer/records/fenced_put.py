"""Writes a record that only one process at a time may write, even if another one wakes up in the middle of its
write."""

from __future__ import annotations

from collections.abc import Callable

from jobs.errors import PreconditionFailed, TransientError
from jobs.s3.client import Store
from jobs.s3.location import Location

_MAX_PUTS = 5


def put_if_ours(
    store: Store, location: Location, body: bytes, *, content_type: str, conditional: bool, is_ours: Callable[[], bool]
) -> bool:
    """Write `location` unless `is_ours` returns False; return whether it was written.

    Replaces what a killed process left there, never what was written after `is_ours` was asked (without conditional
    writes, except within this call). Raises `TransientError` `output_conflict`.
    """
    replaces = None
    for _ in range(_MAX_PUTS):
        if not is_ours():
            return False
        try:
            store.put(location, body, content_type=content_type, replaces=replaces, conditional=conditional)
            return True
        except PreconditionFailed:
            existing = store.head(location, role="output")
            replaces = existing.etag if existing else None
    raise TransientError(f"{location} is written by other processes.", code="output_conflict")
