"""ImageTask: the versioned JSON that one Celery message carries. A message is only a hint: what counts is the ledger.

Version 1: {"v": 1, "job": str, "index": int, "key": str, "etag": str, "size": int, "lane": "live" | "backfill"}, and
where there is one "hint": "new" | "known" | "archived".
Fields are added, never renamed; the form before is read for one release.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from jobs.errors import ImageError

Lane = Literal["live", "backfill"]
LANES: tuple[Lane, ...] = get_args(Lane)

Hint = Literal["", "new", "known", "archived"]
HINTS: tuple[Hint, ...] = get_args(Hint)

VERSION = 1
READS = (1,)
"""This version, and the one before it for one release."""
MAX_KEY_BYTES = 1024
"""S3's own limit for a key, in UTF-8 bytes."""
MAX_INDEX = 2**32
_JOB = re.compile(r"^[0-9a-z-]{1,64}$")


class BadMessage(ImageError):
    """A message that this version can't read: malformed, or not one of ours."""

    code = "bad_message"


class LaterMessage(BadMessage):
    """A message of a later version: workers of that version take it."""


@dataclasses.dataclass(frozen=True, slots=True)
class ImageTask:
    """`etag` without quotes, empty: whatever is there. `size` in bytes, -1: not known. `hint`: what the listing knew of
    it: `new`, its cutout was not there; `known`, it was, and as the recipe makes it; `archived`, S3 gives it only after
    it was restored."""

    job: str
    index: int
    key: str
    etag: str
    size: int
    lane: Lane
    hint: Hint = ""

    @property
    def id(self) -> str:
        """The image's name in the ledger and its Celery task id."""
        return f"{self.job}:{self.index}"

    def to_fields(self) -> dict[str, Any]:
        fields = {
            "v": VERSION,
            "job": self.job,
            "index": self.index,
            "key": self.key,
            "etag": self.etag,
            "size": self.size,
            "lane": self.lane,
        }
        return fields | ({"hint": self.hint} if self.hint else {})

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> ImageTask:
        """Raises `LaterMessage`, or `BadMessage` naming the first field that is wrong."""
        version = fields.get("v")
        if type(version) is int and version > max(READS):
            raise LaterMessage(f"The message has version {version}; this worker reads {max(READS)}: update it.")
        if version not in READS:
            raise BadMessage(f"The message has version {version!r}; this worker reads {READS}.")
        task = cls(**{name: _checked(fields, name) for name in cls.__slots__})
        return task


def _checked(fields: Mapping[str, Any], name: str) -> Any:
    value = fields.get(name, "" if name == "hint" else None)
    if not fits(name, value):
        raise BadMessage(f"The message's field {name!r} is not valid: {str(value)[:80]!r}.")
    return value


def fits(name: str, value: Any) -> bool:
    """Whether a message can carry it in its field `name`."""
    match name:
        case "job":
            return isinstance(value, str) and _JOB.match(value) is not None
        case "index":
            return type(value) is int and 0 <= value < MAX_INDEX
        case "key":
            return isinstance(value, str) and 0 < _utf8_bytes(value) <= MAX_KEY_BYTES
        case "etag":
            return isinstance(value, str) and len(value) <= 256
        case "size":
            return type(value) is int and value >= -1
        case "hint":
            return value in HINTS
        case _:
            return value in LANES


def _utf8_bytes(text: str) -> int:
    """0: what is no UTF-8, a lone half of a surrogate pair."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return 0
