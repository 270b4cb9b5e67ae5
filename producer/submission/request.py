"""What a submission asks for: which images, what is made from them, and how they are fed."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from jobs.errors import SettingsError
from jobs.job import JobKind
from jobs.message import Lane
from jobs.recipe import Recipe
from jobs.s3.client import S3Object
from jobs.s3.location import Location, is_s3_uri

LineReport = Callable[[int, str], None]
"""Called with the number (from 1) and the fault of a manifest line that is left out; it may raise."""


def refuse_line(number: int, reason: str) -> None:
    raise SettingsError(f"Line {number} of the manifest: {reason}. To leave such lines out: --bad-lines skip.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListingFilter:
    """Which objects of a listing are taken. Patterns are shell patterns of the complete key; `*` also matches `/`.
    `since`, `until`: last modified, as Unix time; `until` is exclusive."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_bytes: int = 0
    max_bytes: int | None = None
    since: float | None = None
    until: float | None = None

    def takes(self, found: S3Object) -> bool:
        return self._takes_key(found.key) and self._takes_size(found.size) and self._takes_time(found.modified)

    def _takes_key(self, key: str) -> bool:
        if self.include and not any(fnmatch.fnmatchcase(key, pattern) for pattern in self.include):
            return False
        return not any(fnmatch.fnmatchcase(key, pattern) for pattern in self.exclude)

    def _takes_size(self, size: int) -> bool:
        return size >= self.min_bytes and (self.max_bytes is None or size <= self.max_bytes)

    def _takes_time(self, modified: float) -> bool:
        return (self.since is None or modified >= self.since) and (self.until is None or modified < self.until)


EVERYTHING = ListingFilter()
NOWHERE = Location("", "")
"""Destination of a request that needs none: an estimate writes nothing, a resumed job has its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """`keys` and `manifest` None: everything under `source` that `only` takes. `manifest`: a file, an s3:// object or
    `-`. `bad_line`: called for a manifest line that is invalid. `kind`, `weight`, `rate`, `sample`, `review_of`: see
    `Job`."""

    source: Location
    destination: Location
    recipe: Recipe
    lane: Lane
    name: str
    keys: tuple[str, ...] | None
    manifest: str | None = None
    only: ListingFilter = EVERYTHING
    bad_line: LineReport = refuse_line
    kind: JobKind = JobKind.CUT
    weight: int = 1
    rate: float | None = None
    sample: int | None = None
    webhook: str = ""
    webhook_images: bool = False
    review_of: str = ""

    @property
    def is_ordered(self) -> bool:
        """Whether its images come in key order: named keys and manifests are sorted, listings are not."""
        return self.keys is not None or self.manifest is not None

    def describe_selection(self) -> str:
        """Describe which images of the source are asked for; equal texts mean equal selections. A local manifest is
        identified by its content, one in S3 by its name."""
        if self.keys is not None:
            return f"keys {hashlib.sha256(json.dumps(sorted(set(self.keys))).encode()).hexdigest()[:16]}"
        if self.manifest is None:
            limits = dataclasses.asdict(self.only).items()
            return ", ".join(f"{name} {value}" for name, value in limits if value) or "everything"
        if is_s3_uri(self.manifest):
            return f"manifest {self.manifest}"
        if not Path(self.manifest).is_file():
            return "manifest"  # reading it raises the error
        with Path(self.manifest).open("rb") as file:
            return f"manifest {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
