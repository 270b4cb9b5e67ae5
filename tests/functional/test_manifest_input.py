"""Manifests in every format that catalogues export, named keys, and filters of a listing."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import time
from pathlib import Path

import pyarrow as arrow
import pytest
from pyarrow import parquet

from jobs.errors import SettingsError
from jobs.recipe import Recipe
from jobs.s3.client import S3Object, Store
from jobs.s3.location import Location
from producer.submission.manifest_input import read_manifest
from producer.submission.request import EVERYTHING, NOWHERE, ListingFilter, Request, refuse_line
from producer.submission.sources import read_rows

SOURCE = Location("shop", "photos/")
ODD = ["photos/a b+c%.jpg", "photos/ключ.jpg", "photos/z.jpg"]
Reports = list[tuple[int, str]]


def read(place: Path | str, store: Store, reports: Reports | None = None, *, after: str = "") -> list[S3Object]:
    report = refuse_line if reports is None else lambda number, reason: reports.append((number, reason))
    return list(read_manifest(str(place), SOURCE, store, report=report, after=after))


def ask(source: Location, *, keys: tuple[str, ...] | None = None, only: ListingFilter = EVERYTHING) -> Request:
    return Request(source=source, destination=NOWHERE, recipe=Recipe(), lane="live", name="", keys=keys, only=only)


def keys(rows: list[S3Object]) -> list[str]:
    return [row.key for row in rows]


def test_csv_with_a_header_in_any_order(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "list.csv"
    file.write_text('\ufeffSize,Key,ETag\n7,photos/z.jpg,"""e1"""\n,"photos/a b+c%.jpg",\n9,photos/ключ.jpg,e3\n')

    assert read(file, store) == [
        S3Object("photos/a b+c%.jpg", "", -1),
        S3Object("photos/z.jpg", "e1", 7),
        S3Object("photos/ключ.jpg", "e3", 9),
    ]


def test_csv_without_a_header(store: Store, tmp_path: Path) -> None:
    plain, batch = tmp_path / "plain.csv", tmp_path / "batch.csv"
    plain.write_text("\n".join(ODD) + "\n")
    batch.write_text("shop,photos/a+b%2Bc%25.jpg\nshop,photos/%D0%BA%D0%BB%D1%8E%D1%87.jpg\n")

    assert keys(read(plain, store)) == sorted(ODD)
    assert keys(read(batch, store)) == ["photos/a b+c%.jpg", "photos/ключ.jpg"]


@pytest.mark.parametrize("broken", ['{"key": "photos/', '{"key": ' + "[" * 100_000], ids=["cut", "deep"])
def test_gzip_jsonl_with_one_broken_line(store: Store, tmp_path: Path, broken: str) -> None:
    file = tmp_path / "list.jsonl.gz"
    lines = [json.dumps({"key": ODD[0], "etag": "e", "more": 1}), broken, "", json.dumps({"key": ODD[1]})]
    file.write_bytes(gzip.compress("\n".join(lines).encode()))
    reports: Reports = []

    assert keys(read(file, store, reports)) == ODD[:2]
    assert [number for number, _ in reports] == [2]
    with pytest.raises(SettingsError, match=r"Line 2 .*--bad-lines skip"):
        read(file, store)


def test_each_key_counts_once_and_reading_starts_after_a_key(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "list.csv"
    file.write_text("key,etag\nphotos/b.jpg,old\nphotos/a.jpg,e\nphotos/b.jpg,new\nphotos/folder/,e\n")

    assert [(row.key, row.etag) for row in read(file, store)] == [("photos/a.jpg", "e"), ("photos/b.jpg", "new")]
    assert keys(read(file, store, after="photos/a.jpg")) == ["photos/b.jpg"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("other/a.jpg,e,1", "not under"),
        (",e,1", "no key"),
        ("photos/a.jpg,e,many", "many"),
        ("photos/\udcff.jpg,e,1", "not a valid key"),
        (f"photos/{'é' * 520}.jpg,e,1", "not a valid key"),
        (f"photos/a.jpg,{'e' * 300},1", "not a valid etag"),
        ("photos/a.jpg,e,-5", "not a valid size"),
        ('"photos/a.jpg', "unexpected end"),
        ('"photos/a"b.jpg,e,1', "expected"),
    ],
)
def test_an_invalid_line_is_reported_by_its_number(store: Store, tmp_path: Path, row: str, reason: str) -> None:
    file = tmp_path / "list.csv"
    text = f"key,etag,size\nphotos/ok.jpg,e,1\n{row}\nphotos/z.jpg,e,1\n"
    file.write_bytes(text.encode(errors="surrogateescape"))
    reports: Reports = []

    assert keys(read(file, store, reports)) == ["photos/ok.jpg", "photos/z.jpg"]
    assert [number for number, _ in reports] == [3]
    assert reason in reports[0][1]


@pytest.mark.parametrize("size", ["[1]", "Infinity", '"many"', "{}"])
def test_a_json_line_with_an_invalid_size_is_reported_by_its_number(store: Store, tmp_path: Path, size: str) -> None:
    file = tmp_path / "list.jsonl"
    file.write_text('{"key": "photos/a.jpg"}\n{"key": "photos/b.jpg", "size": ' + size + "}\n")
    reports: Reports = []

    assert keys(read(file, store, reports)) == ["photos/a.jpg"]
    assert [number for number, _ in reports] == [2]


def test_a_key_with_an_invalid_encoding_is_reported_by_its_number(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "batch.csv"
    file.write_text("shop,photos/a.jpg\nshop,photos/%FF.jpg\n")
    reports: Reports = []

    assert keys(read(file, store, reports)) == ["photos/a.jpg"]
    assert [number for number, _ in reports] == [2]


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("cut.jsonl.gz", gzip.compress(b'{"key": "photos/a.jpg"}\n' * 1000)[:-20]),
        ("cut.parquet", b"PAR1" + bytes(20)),
        ("manifest.json", b'{"fileFormat": "CSV", "fileSchema": "Bucket, Key"}'),
        ("manifest.json", b"{"),
        ("manifest.json", b"[" * 100_000),
    ],
    ids=["gzip", "parquet", "no_files", "no_json", "deep"],
)
def test_a_damaged_manifest_is_an_error_with_a_code(store: Store, tmp_path: Path, name: str, body: bytes) -> None:
    (tmp_path / name).write_bytes(body)

    with pytest.raises(SettingsError, match="is it complete") as caught:
        read(tmp_path / name, store, [])

    assert caught.value.code == "manifest_unreadable"


PLACE = Location("inventories", "shop/daily/2026-01-01T01-00Z/manifest.json")


def put_inventory(store: Store, kind: str, schema: str, part: bytes) -> str:
    """Lay out an inventory as AWS does: manifest.json under a date, its parts under data/."""
    key = f"shop/daily/data/1.{kind.lower()}"
    manifest = {
        "sourceBucket": "shop",
        "destinationBucket": "arn:aws:s3:::inventories",
        "version": "2016-11-30",
        "creationTimestamp": "1767229200000",
        "fileFormat": kind,
        "fileSchema": schema,
        "files": [{"key": key, "size": len(part), "MD5checksum": hashlib.md5(part).hexdigest()}],  # noqa: S324  (AWS's)
    }
    store.create_bucket("inventories")
    store.put(Location("inventories", key), part, content_type="application/octet-stream")
    store.put(PLACE, json.dumps(manifest).encode(), content_type="application/json")
    return str(PLACE)


def test_an_inventory_of_csv_has_no_header_and_encoded_keys(store: Store) -> None:
    rows = [
        '"shop","photos/a+b%2Bc%25.jpg","7","2026-01-01T00:00:00.000Z","0cc1"',
        '"shop","photos/%D0%BA%D0%BB%D1%8E%D1%87.jpg","8","2026-01-01T00:00:00.000Z","0cc2"',
    ]
    part = gzip.compress("\n".join(rows).encode())

    assert read(put_inventory(store, "CSV", "Bucket, Key, Size, LastModifiedDate, ETag", part), store) == [
        S3Object("photos/a b+c%.jpg", "0cc1", 7),
        S3Object("photos/ключ.jpg", "0cc2", 8),
    ]


def test_an_inventory_with_versions_gives_the_latest_ones(store: Store) -> None:
    schema = "Bucket, Key, VersionId, IsLatest, IsDeleteMarker, Size, LastModifiedDate, ETag"
    rows = [
        '"shop","photos/a.jpg","v2","true","false","7","2026-01-02T00:00:00.000Z","new"',
        '"shop","photos/a.jpg","v1","false","false","6","2026-01-01T00:00:00.000Z","old"',
        '"shop","photos/gone.jpg","v2","true","true","","2026-01-02T00:00:00.000Z",""',
        '"shop","photos/gone.jpg","v1","false","false","6","2026-01-01T00:00:00.000Z","old"',
    ]
    place = put_inventory(store, "CSV", schema, gzip.compress("\n".join(rows).encode()))

    assert read(place, store) == [S3Object("photos/a.jpg", "new", 7)]


def test_an_inventory_of_parquet_has_plain_keys(store: Store, tmp_path: Path) -> None:
    columns = {
        "bucket": ["shop"] * 3,
        "key": ["photos/a b+c%.jpg", "photos/ключ.jpg", "photos/old.jpg"],
        "version_id": ["v1", "v1", "v1"],
        "is_latest": [True, True, False],
        "is_delete_marker": [False, False, False],
        "size": [7, 8, 9],
        "last_modified_date": arrow.array([0, 0, 0], arrow.timestamp("ms")),
        "e_tag": ["0cc1", "0cc2", "0cc3"],
        "storage_class": ["STANDARD", "STANDARD", "STANDARD"],
    }
    parquet.write_table(arrow.table(columns), tmp_path / "part", compression="snappy")
    schema = "message s3.inventory { required binary bucket (UTF8); required binary key (UTF8); optional int64 size; }"
    place = put_inventory(store, "Parquet", schema, (tmp_path / "part").read_bytes())

    assert read(place, store) == [
        S3Object("photos/a b+c%.jpg", "0cc1", 7),
        S3Object("photos/ключ.jpg", "0cc2", 8),
    ]


def test_an_inventory_of_another_format_is_refused_with_the_setting_to_change(store: Store) -> None:
    with pytest.raises(SettingsError, match="CSV or Parquet") as caught:
        read(put_inventory(store, "ORC", "struct<bucket:string,key:string>", b"ORC"), store)

    assert caught.value.code == "inventory_format"


def test_an_inventory_of_another_bucket_is_refused(store: Store) -> None:
    place = put_inventory(store, "CSV", "Bucket, Key", b"")

    with pytest.raises(SettingsError, match="'shop', not of 'other'"):
        list(read_manifest(place, Location("other", ""), store, report=refuse_line))


def test_parquet(store: Store, tmp_path: Path) -> None:
    parquet.write_table(arrow.table({"key": ODD, "e_tag": ["1", "2", None], "size": [1, None, 3]}), tmp_path / "list")

    assert read(tmp_path / "list", store) == [
        S3Object("photos/a b+c%.jpg", "1", 1),
        S3Object("photos/z.jpg", "", 3),
        S3Object("photos/ключ.jpg", "2", -1),
    ]


def test_stdin(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"key": "photos/a.jpg"}\n')))

    assert keys(read("-", store)) == ["photos/a.jpg"]


def test_a_missing_manifest_is_named(store: Store) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.csv"):
        read("nowhere.csv", store)


def test_named_keys_come_once_and_in_order(store: Store) -> None:
    named = ask(SOURCE, keys=("photos/b.jpg\n", "photos/a.jpg", "", "photos/b.jpg", "photos/x/"))

    assert keys(list(read_rows(named, store))) == ["photos/a.jpg", "photos/b.jpg"]


def test_a_named_key_too_long_for_s3_is_refused(store: Store) -> None:
    with pytest.raises(SettingsError, match="1024 bytes") as caught:
        list(read_rows(ask(SOURCE, keys=("photos/" + "é" * 600,)), store))

    assert caught.value.code == "name_too_long"


@pytest.mark.parametrize(
    ("only", "taken"),
    [
        (ListingFilter(), ["a.jpg", "b.png", "thumbs/a.jpg"]),
        (ListingFilter(include=("*.jpg",)), ["a.jpg", "thumbs/a.jpg"]),
        (ListingFilter(include=("photos/a*", "*.png")), ["a.jpg", "b.png"]),
        (ListingFilter(include=("*.jpg",), exclude=("*/thumbs/*",)), ["a.jpg"]),
        (ListingFilter(min_bytes=3), ["b.png", "thumbs/a.jpg"]),
        (ListingFilter(max_bytes=3), ["a.jpg", "b.png"]),
        (ListingFilter(since=20), ["b.png", "thumbs/a.jpg"]),
        (ListingFilter(since=20, until=30), ["b.png"]),
    ],
)
def test_a_listing_is_filtered_by_pattern_size_and_date(only: ListingFilter, taken: list[str]) -> None:
    listing = [
        S3Object("photos/a.jpg", "e", 2, modified=10),
        S3Object("photos/b.png", "e", 3, modified=20),
        S3Object("photos/thumbs/a.jpg", "e", 4, modified=30),
    ]

    assert [found.key for found in listing if only.takes(found)] == [f"photos/{name}" for name in taken]


def test_a_real_listing_is_filtered_by_size_and_date(store: Store) -> None:
    store.create_bucket("limited")
    for name, size in (("small.jpg", 1), ("large.jpg", 2000), ("note.txt", 2000)):
        store.put(Location("limited", name), b"x" * size, content_type="image/jpeg")

    def listed(only: ListingFilter) -> list[str]:
        return keys(list(read_rows(ask(Location("limited", ""), only=only), store)))

    assert listed(ListingFilter(include=("*.jpg",), min_bytes=1000, since=time.time() - 86_400)) == ["large.jpg"]
    assert listed(ListingFilter(until=time.time() - 86_400)) == []
