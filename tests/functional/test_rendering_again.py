"""Renditions by another recipe, from the stored cutouts: no source is read and no model runs."""

from __future__ import annotations

import json

from jobs.ledger import Ledger
from jobs.recipe import Recipe
from jobs.s3.client import Location, S3Object, Store
from producer.demo.local_stack import LocalStack
from producer.submission.submit import Request, draft, live_row
from tests.support.environment import Run
from tests.support.factories import Places, decode, fetch, put_images, wait_for_midnight, wait_until


def test_a_new_recipe_is_rendered_from_the_stored_cutouts_without_the_model(
    fleet: LocalStack, cutfleet: Run, store: Store, ledger: Ledger, places: Places
) -> None:
    names = put_images(store, places, 3)
    store.put(places.key("page.jpg"), b"<html>", content_type="text/html")
    first = cutfleet("submit", places.source, "--to", places.to, "--wait").stdout.strip()
    before = store.head(places.cutout(names[0]), role="output")
    for name in names:
        store._s3.delete_object(Bucket=places.key(name).bucket, Key=places.key(name).key)

    ran = cutfleet("render", first, "--recipe", "walmart", "--wait")
    again = cutfleet("render", first, "--recipe", "walmart", "--wait")

    assert (ran.returncode, again.returncode) == (0, 0), ran.stderr
    told = json.loads(cutfleet("status", ran.stdout.strip(), "--json").stdout)
    assert (told["total"], told["done"], told["model"]) == (3, 3, "render")
    assert sum(told["tally"]["rules"]["walmart"].values()) == 3
    assert json.loads(cutfleet("status", again.stdout.strip(), "--json").stdout)["skipped"] == 3
    to = Location.parse(places.to)
    made = decode(fetch(store, Location(to.bucket, f"{to.key}walmart/{names[0]}.jpg")))
    assert (made.format, made.size) == ("JPEG", (2200, 2200))
    after = store.head(places.cutout(names[0]), role="output")
    assert before is not None and after is not None
    assert before.etag == after.etag, "the cutout's bytes are the same"
    for field in ("cf-source", "cf-source-etag", "cf-model", "cf-revision", "cf-mask-etag", "cf-quality"):
        assert before.metadata[field] == after.metadata[field]
    made_by, _, renditions = after.metadata["cf-fingerprint"].partition("-")
    assert before.metadata["cf-fingerprint"].startswith(f"{made_by}-")
    assert not before.metadata["cf-fingerprint"].endswith(renditions)


def test_an_image_that_was_rendered_again_is_skipped_by_a_submission_of_that_recipe(
    fleet: LocalStack, cutfleet: Run, store: Store, places: Places
) -> None:
    put_images(store, places, 1)
    first = cutfleet("submit", places.source, "--to", places.to, "--wait").stdout.strip()
    cutfleet("render", first, "--recipe", "ebay", "--wait")

    job = cutfleet("submit", places.source, "--to", places.to, "--recipe", "ebay", "--wait").stdout.strip()

    assert json.loads(cutfleet("status", job, "--json").stdout)["skipped"] == 1


def test_a_cutout_that_is_gone_is_told_and_a_job_without_cutouts_refused(
    fleet: LocalStack, cutfleet: Run, store: Store, places: Places
) -> None:
    names = put_images(store, places, 1)
    first = cutfleet("submit", places.source, "--to", places.to, "--wait").stdout.strip()
    waiting = cutfleet("submit", places.source, "--to", places.to, "--model", "u2net").stdout.strip()
    store._s3.delete_object(Bucket=places.cutout("").bucket, Key=places.cutout(names[0]).key)

    gone = cutfleet("render", first, "--recipe", "ebay", "--wait")
    refused = cutfleet("render", waiting, "--recipe", "ebay")
    as_model = cutfleet("submit", places.source, "--to", places.to, "--model", "render")

    assert gone.returncode == 1
    assert "\tcutout_missing\t" in cutfleet("status", gone.stdout.strip(), "--failed").stdout
    assert (refused.returncode, as_model.returncode) == (2, 2)
    assert "[nothing_to_render]" in refused.stderr and "cutfleet render JOB" in as_model.stderr


def test_a_live_job_is_rendered_again_too(fleet: LocalStack, cutfleet: Run, store: Store, places: Places) -> None:
    names = put_images(store, places, 1)
    live = cutfleet("submit", places.source, *names, "--to", places.to, "--lane", "live", "--wait").stdout.strip()

    again = cutfleet("render", live, "--recipe", "ebay", "--wait")

    assert again.returncode == 0, again.stderr


def test_a_live_job_that_is_not_closed_is_rendered_too(
    fleet: LocalStack, cutfleet: Run, store: Store, ledger: Ledger, places: Places
) -> None:
    wait_for_midnight()
    names = put_images(store, places, 2)
    request = Request(source=places.source, destination=places.to, recipe=Recipe(), lane="live", name="", keys=None)
    day = draft(request, job_id="20260101-rendered-while-open", watch="rendered", store=store)
    rows = [
        ("d" * 8 + name, "", "e", *live_row(index, S3Object(name, "", -1), day)) for index, name in enumerate(names)
    ]
    assert ledger.append_live(day, rows, lease_s=60) == "ok"
    wait_until(lambda: ledger.job(day.id).done == 2, what="both are done")
    assert (ledger.job(day.id).closed, ledger.job(day.id).parts) == (None, 0)

    again = cutfleet("render", day.id, "--recipe", "ebay", "--wait")

    assert again.returncode == 0, again.stderr
    assert ledger.job(again.stdout.strip()).done == 2
    ledger.cancel(day.id)
