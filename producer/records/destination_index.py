"""Index of the objects under a prefix, listed once into a temporary file: a lookup of ten thousand images costs no
request, and memory is constant (disk: about 150 bytes per object)."""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from jobs.s3.client import S3Object, Store
from jobs.s3.listing import list_in_parallel
from jobs.s3.location import Location
from jobs.s3.names import RECORDS

_JOB_JSON = re.compile(rf"^((?:.*/)?{RECORDS}/[^/]+/)job\.json$")
_IN_RECORDS = re.compile(rf"(?:^|/){RECORDS}/")
_KEYS_PER_QUERY = 500


class DestinationIndex:
    """Objects under the prefixes that were added, as they were when listed. `folders`: records of the jobs found
    there."""

    def __init__(self, table: sqlite3.Connection) -> None:
        self.folders: list[Location] = []
        self._table = table

    def add(self, prefixes: Iterable[Location], store: Store, *, limit: int | None = None) -> bool:
        """List `prefixes`: one request per thousand objects. Return False, and add nothing, above `limit` objects."""
        rows = (row for prefix in prefixes for row in self._rows(prefix, store))
        self._table.execute("begin")
        for count, row in enumerate(rows, 1):
            if limit is not None and count > limit:
                self._table.execute("rollback")
                return False
            self._table.execute("insert or replace into objects values (?, ?, ?, ?, 0)", row)
        self._table.execute("commit")
        return True

    def add_destination(self, prefix: Location, store: Store) -> None:
        """List `prefix` without the records of jobs, whose folders are collected."""
        self._table.execute("begin")
        outputs = (row for row in self._rows(prefix, store) if not self._is_record(row[0], prefix))
        self._table.executemany("insert or replace into objects values (?, ?, ?, ?, 0)", outputs)
        self._table.execute("commit")

    @property
    def is_empty(self) -> bool:
        return self._table.execute("select 1 from objects limit 1").fetchone() is None

    def find(self, keys: Iterable[str]) -> dict[str, S3Object]:
        """Return those of `keys` that exist, and mark all of them as explained."""
        wanted = list(keys)
        found: dict[str, S3Object] = {}
        for first in range(0, len(wanted), _KEYS_PER_QUERY):
            some = wanted[first : first + _KEYS_PER_QUERY]
            marks = ",".join("?" * len(some))
            # S608: the statement holds question marks only
            rows = self._table.execute(f"select key, etag, size, modified from objects where key in ({marks})", some)  # noqa: S608
            found |= {key: S3Object(key, etag, size, modified=modified) for key, etag, size, modified in rows}
            self._table.execute(f"update objects set explained = 1 where key in ({marks})", some)  # noqa: S608
        return found

    def modified(self, location: Location) -> float | None:
        """Return when an object was last written, as Unix time; None when it does not exist."""
        row = self._table.execute("select modified from objects where key = ?", (location.key,)).fetchone()
        return None if row is None else float(row[0])

    def unexplained(self, *, before: float) -> Iterator[str]:
        """Yield keys that `find` never got, of objects last written before then."""
        rows = self._table.execute("select key from objects where not explained and modified < ?", (before,))
        yield from (key for (key,) in rows)

    def _rows(self, prefix: Location, store: Store) -> Iterator[tuple[str, str, int, float]]:
        for found in list_in_parallel(store, prefix, role="output"):
            yield found.key, found.etag, found.size, found.modified

    def _is_record(self, key: str, prefix: Location) -> bool:
        relative = key[len(prefix.key) :]
        if folder := _JOB_JSON.match(relative):
            self.folders.append(prefix.below(folder[1]))
        return _IN_RECORDS.search(relative) is not None


@contextmanager
def empty_index() -> Iterator[DestinationIndex]:
    with contextlib.closing(sqlite3.connect("", isolation_level=None)) as table:
        table.execute(
            "create table objects (key text primary key, etag text, size integer, modified real, explained integer)"
            " without rowid"
        )
        yield DestinationIndex(table)


@contextmanager
def index_destination(prefix: Location, store: Store) -> Iterator[DestinationIndex]:
    """Index everything under `prefix`."""
    with empty_index() as index:
        index.add_destination(prefix, store)
        yield index
