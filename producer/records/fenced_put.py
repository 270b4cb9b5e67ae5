"""Records that one process at a time may write, though another was frozen over the same and wakes."""

from __future__ import annotations

from collections.abc import Callable

from jobs.errors import TransientError
from jobs.s3.client import Location, PreconditionFailed, Store

_PUTS = 5


def put_if_ours(
    store: Store, place: Location, body: bytes, *, content_type: str, conditional: bool, is_ours: Callable[[], bool]
) -> bool:
    """What somebody has left there who was killed before it counted is replaced; what was written since `is_ours` was
    asked never is. (Without conditional writes, unless we were frozen just here.) False, and nothing is written, when
    it is not ours. Raises `TransientError` `output_conflict`."""
    replaces = None
    for _ in range(_PUTS):
        if not is_ours():
            return False
        try:
            store.put(place, body, content_type=content_type, replaces=replaces, conditional=conditional)
            return True
        except PreconditionFailed:
            found = store.head(place, role="output")
            replaces = found.etag if found else None
    raise TransientError(f"{place} is written by others.", code="output_conflict")
