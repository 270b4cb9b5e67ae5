"""Where keys come from: everything under a prefix, keys that are named, or a manifest. Each key comes once, and no more
than one row is held in memory.

A manifest is a local file, an s3:// object or `-` (stdin), gzipped or not:
  CSV       a row a line; with a header: columns key, and if there etag and size; without: key alone, or Bucket,Key as
            S3 Batch Operations takes it (its keys are URL-encoded; those under a header or alone are not)
  JSONL     {"key": ..., "etag": ..., "size": ...} a line; etag and size may be missing, other fields are ignored
  Parquet   columns key, etag, size (extra `parquet`)
  manifest.json   of an S3 Inventory: its CSV or Parquet parts are read from beside it; of one with versions, the latest
A key must be complete, as S3 lists it, and stand under the source's prefix.
"""

from __future__ import annotations

import csv
import dataclasses
import fnmatch
import gzip
import itertools
import json
import shutil
import sqlite3
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote_plus

from jobs.errors import SettingsError, SourceError
from jobs.message import MAX_KEY_BYTES, fits
from jobs.s3.client import Location, S3Object, Store
from jobs.s3.listing import list_side_by_side

GZIP = b"\x1f\x8b"
PARQUET = b"PAR1"
_COLUMNS = {
    **{name: name for name in ("key", "etag", "size", "bucket")},
    **{"e_tag": "etag", "islatest": "latest", "is_latest": "latest"},
    **{"isdeletemarker": "deleted", "is_delete_marker": "deleted"},
}

Report = Callable[[int, str], None]
"""Told of a line that makes no sense, by number (from 1) and reason; it may raise."""


def refuse_line(number: int, reason: str) -> None:
    raise SettingsError(f"Line {number} of the manifest: {reason}. To leave such lines out: --bad-lines skip.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Only:
    """Which objects of a listing are taken. Patterns are a shell's, of the complete key; `*` also matches `/`. `since`
    and `until`: when it was last written, in seconds since 1970, the second one excluded."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_bytes: int = 0
    max_bytes: int | None = None
    since: float | None = None
    until: float | None = None

    def takes(self, found: S3Object) -> bool:
        if self.include and not any(fnmatch.fnmatchcase(found.key, pattern) for pattern in self.include):
            return False
        if any(fnmatch.fnmatchcase(found.key, pattern) for pattern in self.exclude):
            return False
        if found.size < self.min_bytes or (self.max_bytes is not None and found.size > self.max_bytes):
            return False
        after = self.since is None or found.modified >= self.since
        return after and (self.until is None or found.modified < self.until)


EVERYTHING = Only()


def list_prefix(store: Store, source: Location, *, only: Only = EVERYTHING) -> Iterator[S3Object]:
    """In no order; folder markers are left out."""
    return filter(only.takes, list_side_by_side(store, source, role="source"))


def named_keys(source: Location, keys: Iterable[str], store: Store, *, after: str = "") -> Iterator[S3Object]:
    """A worker takes the ETag that it finds. Raises `SettingsError` naming the first key that is not under `source`,
    `SourceError` for one that the store is not to touch."""
    for key in sorted({key.strip("\r\n") for key in keys} - {""}):
        if not fits("key", key):
            raise SettingsError(
                f"Key {key[:80]!r}... is no text, or has more than S3's {MAX_KEY_BYTES} bytes.", code="name_too_long"
            )
        _check_place(key, source, store)
        if key > after and not key.endswith("/"):
            yield S3Object(key, "", -1)


def read_manifest(place: str, source: Location, store: Store, *, report: Report, after: str = "") -> Iterator[S3Object]:
    """Rows sorted by key, each key once (its last row counts): sorted on disk, so any number will do."""
    with tempfile.TemporaryDirectory(prefix="cutfleet-") as folder:
        rows = _rows(place, Path(folder), source, store, report)
        yield from _sorted_on_disk(rows, Path(folder), after)


def _rows(place: str, folder: Path, source: Location, store: Store, report: Report) -> Iterator[S3Object]:
    path = _bring(place, folder / "manifest", store)
    if place.endswith("manifest.json"):
        for part, columns in _inventory_parts(place, path, source, store, folder):
            yield from _table(part, source, store, report, columns=columns)
    else:
        yield from _table(path, source, store, report, columns=None)


def _bring(place: str, to: Path, store: Store) -> Path:
    """The manifest as a file here."""
    if place == "-":
        with to.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        return to
    if place.startswith("s3://"):
        store.download(Location.parse(place), to)
        return to
    if not Path(place).is_file():
        raise SettingsError(f"There is no manifest {place!r}: give a file, an s3:// object, or - for stdin.")
    return Path(place)


def _inventory_parts(
    place: str, path: Path, source: Location, store: Store, folder: Path
) -> Iterator[tuple[Path, Sequence[str]]]:
    """The parts of an S3 Inventory stand in the bucket of its manifest.json, or beside a local copy."""
    with _readable():
        listed = dict(json.loads(path.read_text()))
    if listed.get("sourceBucket") not in (source.bucket, None):
        raise SettingsError(f"{place} is an inventory of bucket {listed['sourceBucket']!r}, not of {source.bucket!r}.")
    names = [name.strip().lower() for name in str(listed.get("fileSchema", "")).split(",")]
    columns = [_COLUMNS.get(name, name) for name in names]
    if listed.get("fileFormat") not in ("CSV", "Parquet"):
        raise SettingsError(
            f"{place} has format {listed.get('fileFormat')!r}: set the inventory to CSV or Parquet.",
            code="inventory_format",
        )
    with _readable():
        keys = [str(part["key"]) for part in listed["files"]]
    for key in keys:
        beside = Location.parse(place) if place.startswith("s3://") else None
        where = str(Location(beside.bucket, key)) if beside else str(Path(place).parent / Path(key).name)
        brought = _bring(where, folder / "part", store)
        yield brought, columns
        (folder / "part").unlink(missing_ok=True)


def _table(
    path: Path, source: Location, store: Store, report: Report, *, columns: Sequence[str] | None
) -> Iterator[S3Object]:
    """`columns`: of an inventory's CSV, whose keys are URL-encoded; None: by content."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == PARQUET:
        numbered: Iterator[tuple[int, Mapping[str, Any]]] = _parquet(path)
    elif magic[:2] == GZIP:
        with gzip.open(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            yield from _checked(_text_rows(text, source, columns, report), source, store, report)
        return
    else:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            yield from _checked(_text_rows(text, source, columns, report), source, store, report)
        return
    yield from _checked(numbered, source, store, report)


def _text_rows(
    text: IO[str], source: Location, columns: Sequence[str] | None, report: Report
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    lines = _lines(text)
    first = next(lines, "")
    if columns is None and first.lstrip().startswith(("{", '"{')):
        yield from _jsonl(itertools.chain([first], lines), report)
        return
    encoded, has_header = columns is not None, False
    if columns is None:
        head = next(csv.reader([first]), [])
        known = [_COLUMNS.get(name.strip().lower().replace(" ", "_")) for name in head]
        has_header = "key" in known
        if has_header:
            columns = [name or "" for name in known]
        elif len(head) >= 2 and head[0] == source.bucket:
            columns, encoded = ["bucket", "key"], True
        else:
            columns = ["key"]
    for number, line in enumerate(lines if has_header else itertools.chain([first], lines), 1 + has_header):
        try:
            row = next(csv.reader([line], strict=True), [])
            fields = dict(zip(columns, row, strict=False))
            if encoded and "key" in fields:
                fields["key"] = unquote_plus(fields["key"], errors="strict")
        except (csv.Error, ValueError) as exc:
            report(number, f"no row of CSV: {exc}")
            continue
        if row:
            yield number, fields


def _lines(text: IO[str]) -> Iterator[str]:
    with _readable():
        yield from text


@contextmanager
def _readable() -> Iterator[None]:
    """Raises `SettingsError` for a file that ends too early, or is not what it seems to be."""
    try:
        yield
    except (EOFError, OSError, zlib.error, KeyError, TypeError, ValueError, RecursionError) as exc:
        raise SettingsError(
            f"The manifest, or a part of it, can't be read ({type(exc).__name__}: {exc}): is it complete?",
            code="manifest_unreadable",
        ) from exc


def _jsonl(lines: Iterable[str], report: Report) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as exc:
            report(number, f"no JSON: {exc}")
            continue
        if isinstance(fields, dict):
            yield number, fields
        else:
            report(number, "no JSON object")


def _parquet(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as exc:
        raise SettingsError("To read Parquet: pip install 'cutfleet[parquet]'.") from exc
    numbers = itertools.count(1)
    with _readable():
        file = parquet.ParquetFile(path)
        names = {name: _COLUMNS[name.lower()] for name in file.schema_arrow.names if name.lower() in _COLUMNS}
        for batch in file.iter_batches(columns=list(names)):
            for row in batch.to_pylist():
                yield next(numbers), {names[name]: value for name, value in row.items()}


def _checked(
    rows: Iterable[tuple[int, Mapping[str, Any]]], source: Location, store: Store, report: Report
) -> Iterator[S3Object]:
    for number, fields in rows:
        if str(fields.get("latest", True)).lower() == "false" or str(fields.get("deleted", False)).lower() == "true":
            continue
        try:
            row = _row(fields, source, store)
        except (ValueError, TypeError, OverflowError, SettingsError, SourceError) as exc:
            report(number, str(exc))
            continue
        if not row.key.endswith("/"):
            yield row


def _row(fields: Mapping[str, Any], source: Location, store: Store) -> S3Object:
    key, size, bucket = fields.get("key"), fields.get("size"), fields.get("bucket") or source.bucket
    if not isinstance(key, str) or not key:
        raise ValueError("no key")
    if bucket != source.bucket:
        raise ValueError(f"bucket {bucket!r} is not the source's")
    row = S3Object(key, str(fields.get("etag") or "").strip('"'), int(size) if size not in (None, "") else -1)
    for name, value in (("key", row.key), ("etag", row.etag), ("size", row.size)):
        if not fits(name, value):
            raise ValueError(f"this can't be the {name} of an object: {str(value)[:80]!r}")
    _check_place(key, source, store)
    return row


def _check_place(key: str, source: Location, store: Store) -> None:
    if not key.startswith(source.key):
        raise SettingsError(
            f"Key {key!r} is not under {source}: keys are complete, as S3 lists them. Did you mean "
            f"{source.key + key!r}, or the source s3://{source.bucket}/?"
        )
    store.check(Location(source.bucket, key), "source")


def _sorted_on_disk(rows: Iterable[S3Object], folder: Path, after: str) -> Iterator[S3Object]:
    """SQLite sorts and keeps each key once; BINARY collation is UTF-8 order, as S3 lists."""
    database = sqlite3.connect(folder / "rows.sqlite", isolation_level=None)
    try:
        database.execute("PRAGMA journal_mode = OFF")
        database.execute("PRAGMA synchronous = OFF")
        database.execute("CREATE TABLE rows (key TEXT PRIMARY KEY, etag TEXT, size INTEGER) WITHOUT ROWID")
        database.execute("BEGIN")
        database.executemany(
            "INSERT OR REPLACE INTO rows VALUES (?, ?, ?)", ((row.key, row.etag, row.size) for row in rows)
        )
        database.execute("COMMIT")
        for key, etag, size in database.execute("SELECT * FROM rows WHERE key > ? ORDER BY key", (after,)):
            yield S3Object(key, etag, size)
    finally:
        database.close()
