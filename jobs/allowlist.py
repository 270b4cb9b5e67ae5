"""Which buckets and prefixes a process may touch for a job: `CUTFLEET_SOURCES` and `CUTFLEET_DESTINATIONS`.

An entry ends with `/`, so that `s3://photos/a/` allows nothing in `s3://photos/ab/`. Names are compared letter by
letter, as S3 has them: nothing is decoded or resolved. Some stores do resolve `..`, with either slash, so that where
there is a list, a key with such a segment is under no entry.
"""

from __future__ import annotations

import dataclasses
import re

_ENTRY = re.compile(r"s3://[A-Za-z0-9][A-Za-z0-9._-]+/(.*/)?")
_SLASHES = re.compile(r"[/\\]")


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Prefixes, as `parse_prefixes` gives them, of sources and of results; none: anywhere."""

    sources: tuple[str, ...] = ()
    destinations: tuple[str, ...] = ()


ANYWHERE = Bounds()


def parse_prefixes(text: str) -> tuple[str, ...]:
    """Of entries with commas between, each s3://BUCKET/ or s3://BUCKET/PREFIX/; a prefix may itself hold a comma.
    Raises `ValueError` naming the first that is none."""
    if not text.strip():
        return ()
    entries = tuple(entry.strip() for entry in re.split(r",(?=\s*(?:s3://|$|,))", text))
    for entry in entries:
        if not _ENTRY.fullmatch(entry) or climbs(entry):
            raise ValueError(f"{entry!r} is no s3://BUCKET/ or s3://BUCKET/PREFIX/, which ends with a slash")
    return entries


def is_within(uri: str, prefixes: tuple[str, ...]) -> bool:
    """Whether `uri`, of an object or of a prefix, is under one of `prefixes`, or there are none."""
    return not prefixes or (uri.startswith(prefixes) and not climbs(uri))


def climbs(uri: str) -> bool:
    """Whether a store that resolves `..`, behind either slash, would look elsewhere."""
    return ".." in _SLASHES.split(uri)
