"""ImageTask: the versioned JSON that one Celery message carries, and the queues that it travels on. A message is only a
hint: the ledger decides. `jobs/envelope.py` renders the whole message as Celery reads it.

Version 1: {"v": 1, "job": str, "index": int, "key": str, "etag": str, "size": int, "lane": "live" | "backfill"} and an
optional "hint": "new" | "known" | "archived". Fields are added, never renamed; the previous version is read for one
release.

Queues are per lane and model: `live.M`, `suspect.M`, `backfill.M`, consumed in this order. Workers on a CPU also
consume the queues of `render`, whose images need no model, before their own backfills."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from jobs.errors import ImageError
from jobs.s3.location import MAX_KEY_BYTES

Lane = Literal["live", "backfill"]
LANES: tuple[Lane, ...] = get_args(Lane)
QueueLane = Literal["live", "suspect", "backfill"]
QUEUE_LANES: tuple[QueueLane, ...] = get_args(QueueLane)
"""In the order of consumption: live first; a suspect does not wait for the end of a backfill."""
RENDER_POOL = "render"
"""Takes a model's place in queue names, job listings and metric labels for jobs that need no model."""

Hint = Literal["", "new", "known", "archived"]
HINTS: tuple[Hint, ...] = get_args(Hint)

VERSION = 1
READS = (1,)
"""This version, and the previous one for one release."""
MAX_INDEX = 2**32
_JOB = re.compile(r"^[0-9a-z-]{1,64}$")


class BadMessage(ImageError):
    """A message that this version can't read: malformed, or not one of ours."""

    code = "bad_message"


class LaterMessage(BadMessage):
    """A message of a later version: only workers of that version can take it."""


def queue_name(lane: QueueLane, model: str) -> str:
    """Celery separates queues by commas, so a model's name never holds one."""
    return f"{lane}.{model}"


def worker_queues(model: str, *, renders: bool = False) -> list[str]:
    """Return the queues of a worker in the order of consumption. `renders`: it also takes jobs without a model."""
    models = (RENDER_POOL, model) if renders else (model,)
    return [queue_name(lane, name) for lane in QUEUE_LANES for name in models]


@dataclasses.dataclass(frozen=True, slots=True)
class ImageTask:
    """`etag` without quotes; empty: any version. `size` in bytes; -1: unknown. `hint`, from the listing: `new`, there
    was no cutout; `known`, there was one by this recipe from this version; `archived`, S3 must restore the object
    first."""

    job: str
    index: int
    key: str
    etag: str
    size: int
    lane: Lane
    hint: Hint = ""

    @property
    def id(self) -> str:
        """The image's id in the ledger, and its Celery task id."""
        return f"{self.job}:{self.index}"

    def to_fields(self) -> dict[str, Any]:
        fields = {"v": VERSION, "job": self.job, "index": self.index, "key": self.key, "etag": self.etag}
        fields |= {"size": self.size, "lane": self.lane}
        return fields | ({"hint": self.hint} if self.hint else {})

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> ImageTask:
        """Raises `LaterMessage`, or `BadMessage` that names the first invalid field."""
        version = fields.get("v")
        if type(version) is int and version > max(READS):
            raise LaterMessage(f"The message has version {version}; this worker reads {max(READS)}: update it.")
        if version not in READS:
            raise BadMessage(f"The message has version {version!r}; this worker reads {READS}.")
        return cls(**{name: _checked(fields, name) for name in cls.__slots__})


def is_valid(name: str, value: Any) -> bool:
    """Whether a message can carry `value` in its field `name`."""
    return _CHECKS[name](value)


def _checked(fields: Mapping[str, Any], name: str) -> Any:
    value = fields.get(name, "" if name == "hint" else None)
    if not is_valid(name, value):
        raise BadMessage(f"The message's field {name!r} is not valid: {str(value)[:80]!r}.")
    return value


def _utf8_bytes(text: str) -> int:
    """Length in UTF-8; 0 for text that is not UTF-8 (a lone surrogate)."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return 0


_CHECKS = {
    "job": lambda value: isinstance(value, str) and _JOB.match(value) is not None,
    "index": lambda value: type(value) is int and 0 <= value < MAX_INDEX,
    "key": lambda value: isinstance(value, str) and 0 < _utf8_bytes(value) <= MAX_KEY_BYTES,
    "etag": lambda value: isinstance(value, str) and len(value) <= 256,
    "size": lambda value: type(value) is int and value >= -1,
    "hint": lambda value: value in HINTS,
    "lane": lambda value: value in LANES,
}
