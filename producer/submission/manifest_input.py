"""Reads a manifest that a user gives: a local file, an s3:// object or `-` (stdin), gzipped or not.

  CSV       one row per line; with a header: column key, optionally etag and size; without: the key alone, or Bucket,Key
            as S3 Batch Operations takes it (URL-encoded keys; keys under a header or alone are not encoded)
  JSONL     {"key": ..., "etag": ..., "size": ...} per line; etag and size are optional, other fields are ignored
  Parquet   columns key, etag, size (extra `parquet`)
  manifest.json   of an S3 Inventory, whose CSV or Parquet parts are read from beside it; latest versions only
A key must be complete, as S3 lists it, and under the source's prefix.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import shutil
import sqlite3
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote_plus

from jobs.errors import SettingsError, SourceError
from jobs.message import is_valid
from jobs.s3.client import S3Object, Store
from jobs.s3.location import Location, is_s3_uri
from producer.submission.request import LineReport

GZIP = b"\x1f\x8b"
PARQUET = b"PAR1"
_COLUMNS = {
    **{name: name for name in ("key", "etag", "size", "bucket")},
    **{"e_tag": "etag", "islatest": "latest", "is_latest": "latest"},
    **{"isdeletemarker": "deleted", "is_delete_marker": "deleted"},
}

Row = tuple[int, Mapping[str, Any]]
"""Number of the line, and its fields by name."""


def read_manifest(
    manifest: str, source: Location, store: Store, *, report: LineReport, after: str = ""
) -> Iterator[S3Object]:
    """Yield the rows after key `after` sorted by key, each key once (its last row counts). Sorted on disk, for any
    number of rows. `report`: called for an invalid line."""
    with tempfile.TemporaryDirectory(prefix="cutfleet-") as folder:
        rows = _rows(manifest, Path(folder), source, store, report)
        yield from _sorted_on_disk(rows, Path(folder), after)


def check_key(key: str, source: Location, store: Store) -> None:
    """Raises `SettingsError` for a key outside `source`, `SourceError` for one outside the allowlist."""
    if not key.startswith(source.key):
        raise SettingsError(
            f"Key {key!r} is not under {source}: keys are complete, as S3 lists them. Did you mean "
            f"{source.key + key!r}, or the source {source.at('')}?"
        )
    store.check_allowed(source.at(key), "source")


def _rows(manifest: str, folder: Path, source: Location, store: Store, report: LineReport) -> Iterator[S3Object]:
    path = _fetch(manifest, folder / "manifest", store)
    if manifest.endswith("manifest.json"):
        for part, columns in _inventory_parts(manifest, path, source, store, folder):
            yield from _read_file(part, source, store, report, columns=columns)
    else:
        yield from _read_file(path, source, store, report, columns=None)


def _fetch(manifest: str, to: Path, store: Store) -> Path:
    """Return the manifest as a local file."""
    if manifest == "-":
        with to.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        return to
    if is_s3_uri(manifest):
        store.download(Location.parse(manifest), to)
        return to
    if not Path(manifest).is_file():
        raise SettingsError(f"There is no manifest {manifest!r}: give a file, an s3:// object, or - for stdin.")
    return Path(manifest)


def _inventory_parts(
    manifest: str, path: Path, source: Location, store: Store, folder: Path
) -> Iterator[tuple[Path, Sequence[str]]]:
    """Yield the parts of an S3 Inventory, from the bucket of its manifest.json or beside a local copy, and their
    columns."""
    with _naming_damage():
        inventory = dict(json.loads(path.read_text()))
    if inventory.get("sourceBucket") not in (source.bucket, None):
        raise SettingsError(
            f"{manifest} is an inventory of bucket {inventory['sourceBucket']!r}, not of {source.bucket!r}."
        )
    names = [name.strip().lower() for name in str(inventory.get("fileSchema", "")).split(",")]
    columns = [_COLUMNS.get(name, name) for name in names]
    if inventory.get("fileFormat") not in ("CSV", "Parquet"):
        raise SettingsError(
            f"{manifest} has format {inventory.get('fileFormat')!r}: set the inventory to CSV or Parquet.",
            code="inventory_format",
        )
    with _naming_damage():
        keys = [str(part["key"]) for part in inventory["files"]]
    for key in keys:
        beside = Path(manifest).parent / Path(key).name
        part = str(Location.parse(manifest).at(key) if is_s3_uri(manifest) else beside)
        yield _fetch(part, folder / "part", store), columns
        (folder / "part").unlink(missing_ok=True)


def _read_file(
    path: Path, source: Location, store: Store, report: LineReport, *, columns: Sequence[str] | None
) -> Iterator[S3Object]:
    """`columns`: of an inventory's CSV, whose keys are URL-encoded; None: detected."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == PARQUET:
        yield from _valid_rows(_parquet_rows(path), source, store, report)
        return
    open_text = gzip.open if magic[:2] == GZIP else open
    with open_text(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        yield from _valid_rows(_text_rows(text, source, columns, report), source, store, report)


def _text_rows(text: IO[str], source: Location, columns: Sequence[str] | None, report: LineReport) -> Iterator[Row]:
    lines = _lines(text)
    first = next(lines, "")
    lines = itertools.chain([first], lines)
    if columns is not None:
        return _csv_rows(lines, columns, report, is_encoded=True)
    if first.lstrip().startswith(("{", '"{')):
        return _jsonl_rows(lines, report)
    head = next(csv.reader([first]), [])
    header = [_COLUMNS.get(name.strip().lower().replace(" ", "_"), "") for name in head]
    if "key" in header:
        return _csv_rows(itertools.islice(lines, 1, None), header, report, first_number=2)
    if len(head) >= 2 and head[0] == source.bucket:
        return _csv_rows(lines, ["bucket", "key"], report, is_encoded=True)
    return _csv_rows(lines, ["key"], report)


def _csv_rows(
    lines: Iterable[str],
    columns: Sequence[str],
    report: LineReport,
    *,
    is_encoded: bool = False,
    first_number: int = 1,
) -> Iterator[Row]:
    for number, line in enumerate(lines, first_number):
        try:
            row = next(csv.reader([line], strict=True), [])
            fields = dict(zip(columns, row, strict=False))
            if is_encoded and "key" in fields:
                fields["key"] = unquote_plus(fields["key"], errors="strict")
        except (csv.Error, ValueError) as exc:
            report(number, f"not a row of CSV: {exc}")
            continue
        if row:
            yield number, fields


def _jsonl_rows(lines: Iterable[str], report: LineReport) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as exc:
            report(number, f"not JSON: {exc}")
            continue
        if isinstance(fields, dict):
            yield number, fields
        else:
            report(number, "not a JSON object")


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as exc:
        raise SettingsError("To read Parquet: pip install 'cutfleet[parquet]'.") from exc
    numbers = itertools.count(1)
    with _naming_damage():
        file = parquet.ParquetFile(path)
        names = {name: _COLUMNS[name.lower()] for name in file.schema_arrow.names if name.lower() in _COLUMNS}
        for batch in file.iter_batches(columns=list(names)):
            for row in batch.to_pylist():
                yield next(numbers), {names[name]: value for name, value in row.items()}


def _lines(text: IO[str]) -> Iterator[str]:
    with _naming_damage():
        yield from text


@contextmanager
def _naming_damage() -> Iterator[None]:
    """Raises `SettingsError` `manifest_unreadable` for a truncated file, or one of another format."""
    try:
        yield
    except (EOFError, OSError, zlib.error, KeyError, TypeError, ValueError, RecursionError) as exc:
        raise SettingsError(
            f"The manifest, or a part of it, can't be read ({type(exc).__name__}: {exc}): is it complete?",
            code="manifest_unreadable",
        ) from exc


def _valid_rows(rows: Iterable[Row], source: Location, store: Store, report: LineReport) -> Iterator[S3Object]:
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
        if not is_valid(name, value):
            raise ValueError(f"not a valid {name} of an object: {str(value)[:80]!r}")
    check_key(key, source, store)
    return row


def _sorted_on_disk(rows: Iterable[S3Object], folder: Path, after: str) -> Iterator[S3Object]:
    """Sort with SQLite, which keeps each key once; BINARY collation is UTF-8 order, the order in which S3 lists."""
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
