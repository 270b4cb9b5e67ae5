"""Renditions through the whole system: beside the cutout, measured, counted, and never over somebody else's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.ledger import Ledger
from jobs.s3.client import Location, Store
from producer.demo.local_stack import LocalStack
from tests.support.environment import Run
from tests.support.factories import Places, decode, fetch, put_images, sample_image

SHOP = """
key_pattern = '(?P<sku>[a-z]\\d+)'
[cutout]
cache_control = "max-age=60"
[[renditions]]
name = "shop"
canvas = "square"
min_px = 200
path = "shop/{sku}.MAIN.{ext}"
[renditions.delivery]
cache_control = "public, max-age=31536000"
storage_class = "STANDARD_IA"
[renditions.rules]
source = "this shop's own"
min_px = 150
advised_px = 5000
exact_background = true
[[renditions]]
name = "web"
format = "webp"
background = "transparent"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "shop.toml").write_text(SHOP)
    return str(tmp_path / "shop.toml")


def submit(cutfleet: Run, places: Places, *more: str, code: int = 0) -> str:
    ran = cutfleet("submit", places.source, "--to", places.to, "--wait", *more)
    assert ran.returncode == code, ran.stderr
    return ran.stdout.strip()


def summary(cutfleet: Run, job: str, *more: str) -> dict[str, object]:
    return dict(json.loads(cutfleet("status", job, "--json", *more).stdout))


def at(places: Places, path: str) -> Location:
    to = Location.parse(places.to)
    return Location(to.bucket, to.key + path)


def test_renditions_stand_beside_the_cutout_and_are_told_of(
    fleet: LocalStack, cutfleet: Run, store: Store, places: Places, recipe: str
) -> None:
    etag = store.put(places.key("p00000.jpg"), sample_image(), content_type="image/jpeg")
    store.put(places.key("p00001.jpg"), sample_image(seed=1), content_type="image/jpeg")

    job = submit(cutfleet, places, "--recipe", recipe)

    shop, web = at(places, "shop/p00000.MAIN.jpg"), at(places, "web/p00001.jpg.webp")
    assert (decode(fetch(store, shop)).format, decode(fetch(store, shop)).size) == ("JPEG", (200, 200))
    assert (decode(fetch(store, web)).format, decode(fetch(store, web)).size) == ("WEBP", (160, 120))
    found = store._s3.head_object(Bucket=shop.bucket, Key=shop.key)
    assert (found["ContentType"], found["CacheControl"]) == ("image/jpeg", "public, max-age=31536000")
    assert found["StorageClass"] == "STANDARD_IA"
    assert json.loads(found["Metadata"]["cf-rules"])["pixels"] == ["warn", "200"]
    cutout = store.head(places.cutout("p00000.jpg"), role="output")
    assert cutout is not None
    assert cutout.metadata["cf-renditions"].split()[0] == found["ETag"].strip('"')
    assert store._s3.head_object(Bucket=shop.bucket, Key=cutout.key)["CacheControl"] == "max-age=60"
    info = decode(fetch(store, places.cutout("p00000.jpg"))).info
    assert (info["Software"], info["Model"], info["Source-etag"]) == ("Cutfleet", "u2netp", etag)
    assert (info["Recipe"], info["Revision"]) == (cutout.metadata["cf-fingerprint"], cutout.metadata["cf-revision"])
    told = summary(cutfleet, job, "--flagged")
    tally = told["tally"]
    assert isinstance(tally, dict)
    assert (tally["review"], tally["rules"]) == ({}, {"shop": {"warn": 2}})
    assert [row["key"] for row in told["flagged"]] == ["p00000.jpg", "p00001.jpg"]  # type: ignore[attr-defined]
    assert "shop: 2 warn" in cutfleet("status", job).stdout
    assert "shop: pixels 200 (warn, at least 150, better 5000" in cutfleet("status", job, "--flagged").stdout
    remarks = fetch(store, at(places, f"_cutfleet/{job}/report/remarks.jsonl")).decode().splitlines()
    assert len(remarks) == 2
    assert json.loads(fetch(store, at(places, f"_cutfleet/{job}/report/summary.json")))["tally"] == told["tally"]


def test_what_has_all_renditions_is_skipped_and_what_lacks_one_is_made_again(
    fleet: LocalStack, cutfleet: Run, store: Store, places: Places, recipe: str
) -> None:
    put_images(store, places, 2)
    submit(cutfleet, places, "--recipe", recipe)

    again = summary(cutfleet, submit(cutfleet, places, "--recipe", recipe))
    store._s3.delete_object(Bucket=at(places, "").bucket, Key=at(places, "web/p00001.jpg.webp").key)
    third = summary(cutfleet, submit(cutfleet, places, "--recipe", recipe))

    assert (again["skipped"], again["done"]) == (2, 0)
    assert (third["skipped"], third["done"]) == (1, 1)
    assert store.head(at(places, "web/p00001.jpg.webp"), role="output") is not None


def test_two_images_of_one_name_do_not_overwrite_each_other(
    fleet: LocalStack, cutfleet: Run, store: Store, places: Places, recipe: str
) -> None:
    store.put(places.key("a1/p7.jpg"), sample_image(seed=1), content_type="image/jpeg")
    store.put(places.key("a1/p7.png"), sample_image(seed=2, form="PNG"), content_type="image/png")
    store.put(places.key("nothing.jpg"), sample_image(seed=3), content_type="image/jpeg")

    job = submit(cutfleet, places, "--recipe", recipe, code=1)

    rows = dict(line.split("\t")[:2] for line in cutfleet("status", job, "--failed").stdout.splitlines())
    taken = {"a1/p7.jpg", "a1/p7.png"} & rows.keys()
    assert len(taken) == 1
    assert rows == {"nothing.jpg": "name_unmatched", taken.pop(): "name_taken"}
    made = {found.key for found in store.list_source(at(places, "")) if not found.key.startswith("_cutfleet/")}
    assert len(made) == 4, "mask, cutout and two renditions of one image, and nothing of the refused"


def test_artist_and_copyright_are_kept_when_asked_for_and_nothing_else(
    fleet: LocalStack, cutfleet: Run, store: Store, places: Places, tmp_path: Path
) -> None:
    from io import BytesIO

    from PIL import Image

    exif = Image.Exif()
    exif[0x8298], exif[0x0110], exif.get_ifd(0x8825)[1] = "(c) A. Turner", "a camera", "N"
    body = BytesIO()
    decode(sample_image()).save(body, "JPEG", exif=exif)
    store.put(places.key("p1.jpg"), body.getvalue(), content_type="image/jpeg")

    submit(cutfleet, places, "--recipe", "webp", "--keep-metadata")

    assert decode(fetch(store, places.cutout("p1.jpg"))).info["Copyright"] == "(c) A. Turner"
    assert dict(decode(fetch(store, at(places, "webp/p1.jpg.webp"))).getexif()) == {0x8298: "(c) A. Turner"}


def test_a_recipe_is_checked_before_anything_is_submitted(
    cutfleet: Run, store: Store, places: Places, ledger: Ledger, tmp_path: Path
) -> None:
    put_images(store, places, 1)
    (tmp_path / "bad.toml").write_text('edges = "soft"\n[[renditions]]\nname = "a"\nfill = 2')

    bad = cutfleet("submit", places.source, "--to", places.to, "--recipe", str(tmp_path / "bad.toml"))
    unknown = cutfleet("submit", places.source, "--to", places.to, "--recipe", "amazon")

    assert (bad.returncode, unknown.returncode) == (2, 2)
    assert "edges" in bad.stderr and "renditions.0.fill" in bad.stderr
    assert "amazon-main" in unknown.stderr
    assert not any(job.source == places.source for job in ledger.jobs())


def test_the_recipes_that_come_along_are_listed_and_printed(cutfleet: Run, tmp_path: Path) -> None:
    listed = cutfleet("recipes").stdout
    shown = cutfleet("recipes", "show", "amazon-main").stdout

    assert {line.split()[0] for line in listed.splitlines()} >= {"default", "amazon-main", "walmart"}
    assert 'name = "amazon-main"' in shown and "secondary = true" in shown
    assert cutfleet("recipes", "show", "nothing").returncode == 2
