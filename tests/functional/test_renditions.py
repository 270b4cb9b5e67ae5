"""Renditions through the whole system: written beside the cutout, checked against rules, counted; no foreign object is
overwritten."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jobs.ledger import Ledger
from jobs.s3.client import Store
from producer.demo.local_stack import LocalStack
from tests.support.environment import Run
from tests.support.images import decode_image, put_images, sample_image
from tests.support.places import Places, delete_object, fetch_output, plain_client

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


def submit_and_wait(cutfleet: Run, places: Places, *options: str, code: int = 0) -> str:
    ran = cutfleet("submit", places.source, "--to", places.to, "--wait", *options)
    assert ran.returncode == code, ran.stderr
    return ran.stdout.strip()


def read_status(cutfleet: Run, job: str, *options: str) -> dict[str, Any]:
    return dict(json.loads(cutfleet("status", job, "--json", *options).stdout))


def test_renditions_are_written_and_their_rule_results_are_shown(
    fleet: LocalStack, cutfleet: Run, store: Store, places: Places, recipe: str
) -> None:
    etag = store.put(places.key("p00000.jpg"), sample_image(), content_type="image/jpeg")
    store.put(places.key("p00001.jpg"), sample_image(seed=1), content_type="image/jpeg")

    job = submit_and_wait(cutfleet, places, "--recipe", recipe)

    shop, web = places.destination.below("shop/p00000.MAIN.jpg"), places.destination.below("web/p00001.jpg.webp")
    for location, expected in ((shop, ("JPEG", (200, 200))), (web, ("WEBP", (160, 120)))):
        image = decode_image(fetch_output(store, location))
        assert (image.format, image.size) == expected
    with plain_client(store) as client:
        found = client.head_object(Bucket=shop.bucket, Key=shop.key)
        stored_cutout = client.head_object(Bucket=shop.bucket, Key=places.cutout("p00000.jpg").key)
    assert (found["ContentType"], found["CacheControl"]) == ("image/jpeg", "public, max-age=31536000")
    assert found["StorageClass"] == "STANDARD_IA"
    assert json.loads(found["Metadata"]["cf-rules"])["pixels"] == ["warn", "200"]
    cutout = store.head(places.cutout("p00000.jpg"), role="output")
    assert cutout is not None
    assert cutout.metadata["cf-renditions"].split()[0] == found["ETag"].strip('"')
    assert stored_cutout["CacheControl"] == "max-age=60"
    info = decode_image(fetch_output(store, places.cutout("p00000.jpg"))).info
    assert (info["Software"], info["Model"], info["Source-etag"]) == ("Cutfleet", "u2netp", etag)
    assert (info["Recipe"], info["Revision"]) == (cutout.metadata["cf-fingerprint"], cutout.metadata["cf-revision"])
    status = read_status(cutfleet, job, "--flagged")
    assert (status["tally"]["review"], status["tally"]["rules"]) == ({}, {"shop": {"warn": 2}})
    assert [row["key"] for row in status["flagged"]] == ["p00000.jpg", "p00001.jpg"]
    assert "shop: 2 warn" in cutfleet("status", job).stdout
    assert "shop: pixels 200 (warn, at least 150, better 5000" in cutfleet("status", job, "--flagged").stdout
    notes = fetch_output(store, places.destination.below(f"_cutfleet/{job}/report/remarks.jsonl")).decode().splitlines()
    assert len(notes) == 2
    assert (
        json.loads(fetch_output(store, places.destination.below(f"_cutfleet/{job}/report/summary.json")))["tally"]
        == status["tally"]
    )


def test_an_image_with_all_renditions_is_skipped_and_one_that_lacks_a_rendition_is_not(
    fleet: LocalStack, cutfleet: Run, store: Store, places: Places, recipe: str
) -> None:
    put_images(store, places, 2)
    submit_and_wait(cutfleet, places, "--recipe", recipe)

    second = read_status(cutfleet, submit_and_wait(cutfleet, places, "--recipe", recipe))
    delete_object(store, places.destination.below("web/p00001.jpg.webp"))
    third = read_status(cutfleet, submit_and_wait(cutfleet, places, "--recipe", recipe))

    assert (second["skipped"], second["done"]) == (2, 0)
    assert (third["skipped"], third["done"]) == (1, 1)
    assert store.head(places.destination.below("web/p00001.jpg.webp"), role="output") is not None


def test_two_images_with_the_same_rendition_name_do_not_overwrite_each_other(
    fleet: LocalStack, cutfleet: Run, store: Store, places: Places, recipe: str
) -> None:
    store.put(places.key("a1/p7.jpg"), sample_image(seed=1), content_type="image/jpeg")
    store.put(places.key("a1/p7.png"), sample_image(seed=2, form="PNG"), content_type="image/png")
    store.put(places.key("nothing.jpg"), sample_image(seed=3), content_type="image/jpeg")

    job = submit_and_wait(cutfleet, places, "--recipe", recipe, code=1)

    rows = dict(line.split("\t")[:2] for line in cutfleet("status", job, "--failed").stdout.splitlines())
    taken = {"a1/p7.jpg", "a1/p7.png"} & rows.keys()
    assert len(taken) == 1
    assert rows == {"nothing.jpg": "name_unmatched", taken.pop(): "name_taken"}
    outputs = {found.key for found in store.list_source(places.destination) if not found.key.startswith("_cutfleet/")}
    assert len(outputs) == 4, "mask, cutout and two renditions of one image; none of the failed ones"


def test_only_artist_and_copyright_are_kept_with_keep_metadata(
    fleet: LocalStack, cutfleet: Run, store: Store, places: Places, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x8298], exif[0x0110], exif.get_ifd(0x8825)[1] = "(c) A. Turner", "a camera", "N"
    body = BytesIO()
    decode_image(sample_image()).save(body, "JPEG", exif=exif)
    store.put(places.key("p1.jpg"), body.getvalue(), content_type="image/jpeg")

    submit_and_wait(cutfleet, places, "--recipe", "webp", "--keep-metadata")

    assert decode_image(fetch_output(store, places.cutout("p1.jpg"))).info["Copyright"] == "(c) A. Turner"
    rendition = decode_image(fetch_output(store, places.destination.below("webp/p1.jpg.webp")))
    assert dict(rendition.getexif()) == {0x8298: "(c) A. Turner"}


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
    assert not any(job.source == places.source_location for job in ledger.jobs.newest())


def test_the_built_in_recipes_are_listed_and_printed(cutfleet: Run, tmp_path: Path) -> None:
    listed = cutfleet("recipes").stdout
    shown = cutfleet("recipes", "show", "amazon-main").stdout

    assert {line.split()[0] for line in listed.splitlines()} >= {"default", "amazon-main", "walmart"}
    assert 'name = "amazon-main"' in shown and "secondary = true" in shown
    assert cutfleet("recipes", "show", "nothing").returncode == 2
