"""Buckets and prefixes that a process may use: `CUTFLEET_SOURCES` and `CUTFLEET_DESTINATIONS`.

An entry ends with `/`, so that `s3://photos/a/` allows nothing in `s3://photos/ab/`. Names are compared character by
character, as S3 does: nothing is decoded or resolved. Some stores resolve `..` after either slash, so a key with such a
segment is never allowed by a list.
"""

from __future__ import annotations

import dataclasses
import re

_ENTRY = re.compile(r"s3://[A-Za-z0-9][A-Za-z0-9._-]+/(.*/)?")
_SLASHES = re.compile(r"[/\\]")


@dataclasses.dataclass(frozen=True)
class Allowlist:
    """Prefixes of sources and of outputs, as `parse_prefixes` returns them; empty: anywhere."""

    sources: tuple[str, ...] = ()
    destinations: tuple[str, ...] = ()


ANYWHERE = Allowlist()


def parse_prefixes(text: str) -> tuple[str, ...]:
    """Parse comma-separated entries, each s3://BUCKET/ or s3://BUCKET/PREFIX/; a prefix may itself hold a comma. Raises
    `ValueError` for the first malformed entry."""
    if not text.strip():
        return ()
    entries = tuple(entry.strip() for entry in re.split(r",(?=\s*(?:s3://|$|,))", text))
    for entry in entries:
        if not _ENTRY.fullmatch(entry) or has_parent_segment(entry):
            raise ValueError(f"{entry!r} is not s3://BUCKET/ or s3://BUCKET/PREFIX/; an entry ends with a slash")
    return entries


def is_allowed(uri: str, prefixes: tuple[str, ...]) -> bool:
    """Whether `uri`, of an object or a prefix, is under one of `prefixes`, or `prefixes` is empty."""
    return not prefixes or (uri.startswith(prefixes) and not has_parent_segment(uri))


def has_parent_segment(uri: str) -> bool:
    """Whether a segment is `..`: a store that resolves it would read or write elsewhere."""
    return ".." in _SLASHES.split(uri)
