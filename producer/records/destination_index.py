"""What stands under a destination, listed once into a temporary file: a question about ten thousand images costs no
request, and memory stays the same for millions (disk: some 150 bytes an object)."""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from jobs.s3.client import RECORDS, Location, S3Object, Store
from jobs.s3.listing import list_side_by_side

_RECORD = re.compile(rf"^((?:.*/)?{RECORDS}/[^/]+/)job\.json$")
_IN_RECORDS = re.compile(rf"(?:^|/){RECORDS}/")
_MOST_ASKED = 500


class Destination:
    """The objects of results under one prefix, as they were when `listed` began. `folders`: those of jobs that write
    there, or below."""

    def __init__(self, table: sqlite3.Connection) -> None:
        self.folders: list[Location] = []
        self.count = 0
        self._table = table

    def find(self, keys: Iterable[str]) -> dict[str, S3Object]:
        """Those of `keys` that are there; all of them count as explained."""
        wanted = list(keys)
        found: dict[str, S3Object] = {}
        for first in range(0, len(wanted), _MOST_ASKED):
            some = wanted[first : first + _MOST_ASKED]
            marks = ",".join("?" * len(some))
            # S608: the statement holds question marks only
            rows = self._table.execute(f"select key, etag, size, modified from objects where key in ({marks})", some)  # noqa: S608
            found |= {key: S3Object(key, etag, size, modified=modified) for key, etag, size, modified in rows}
            self._table.execute(f"update objects set explained = 1 where key in ({marks})", some)  # noqa: S608
        return found

    def unexplained(self, *, before: float) -> Iterator[str]:
        """Keys that nobody asked for, of objects last written before then."""
        rows = self._table.execute("select key from objects where not explained and modified < ?", (before,))
        yield from (key for (key,) in rows)


@contextmanager
def listed(prefix: Location, store: Store) -> Iterator[Destination]:
    """One request for each thousand objects under `prefix`."""
    with contextlib.closing(sqlite3.connect("")) as table:
        table.execute(
            "create table objects (key text primary key, etag text, size integer, modified real, explained integer)"
            " without rowid"
        )
        destination = Destination(table)
        table.executemany("insert or replace into objects values (?, ?, ?, ?, 0)", _rows(prefix, store, destination))
        yield destination


def _rows(prefix: Location, store: Store, destination: Destination) -> Iterator[tuple[str, str, int, float]]:
    for found in list_side_by_side(store, prefix, role="output"):
        relative = found.key[len(prefix.key) :]
        if _IN_RECORDS.search(relative):
            if folder := _RECORD.match(relative):
                destination.folders.append(Location(prefix.bucket, prefix.key + folder[1]))
            continue
        destination.count += 1
        yield found.key, found.etag, found.size, found.modified
