"""`cutfleet render`: renditions by another recipe from the stored cutouts, without sources and model."""

from __future__ import annotations

import json

from jobs.ledger import Ledger
from jobs.ledger.watches import Appended
from jobs.recipe import Recipe
from jobs.s3.client import S3Object, Store
from producer.demo.local_stack import LocalStack
from producer.records.manifest import live_row
from producer.submission.request import Request
from producer.submission.submit import draft_job
from tests.support.environment import Run
from tests.support.images import decode_image, put_images
from tests.support.places import Places, delete_object, fetch_output
from tests.support.waiting import wait_past_midnight, wait_until


def test_renditions_of_a_new_recipe_are_made_from_stored_cutouts_without_the_model(
    fleet: LocalStack, cutfleet: Run, store: Store, ledger: Ledger, places: Places
) -> None:
    names = put_images(store, places, 3)
    store.put(places.key("page.jpg"), b"<html>", content_type="text/html")
    first = cutfleet("submit", places.source, "--to", places.to, "--wait").stdout.strip()
    before = store.head(places.cutout(names[0]), role="output")
    for name in names:
        delete_object(store, places.key(name))

    ran = cutfleet("render", first, "--recipe", "walmart", "--wait")
    second = cutfleet("render", first, "--recipe", "walmart", "--wait")

    assert (ran.returncode, second.returncode) == (0, 0), ran.stderr
    status = json.loads(cutfleet("status", ran.stdout.strip(), "--json").stdout)
    assert (status["total"], status["done"], status["model"]) == (3, 3, "render")
    assert sum(status["tally"]["rules"]["walmart"].values()) == 3
    assert json.loads(cutfleet("status", second.stdout.strip(), "--json").stdout)["skipped"] == 3
    rendition = decode_image(fetch_output(store, places.destination.below(f"walmart/{names[0]}.jpg")))
    assert (rendition.format, rendition.size) == ("JPEG", (2200, 2200))
    after = store.head(places.cutout(names[0]), role="output")
    assert before is not None and after is not None
    assert before.etag == after.etag, "the cutout's bytes are the same"
    for field in ("cf-source", "cf-source-etag", "cf-model", "cf-revision", "cf-mask-etag", "cf-quality"):
        assert before.metadata[field] == after.metadata[field]
    model_part, _, rendition_part = after.metadata["cf-fingerprint"].partition("-")
    assert before.metadata["cf-fingerprint"].startswith(f"{model_part}-")
    assert not before.metadata["cf-fingerprint"].endswith(rendition_part)


def test_a_rendered_image_is_skipped_by_a_submission_with_the_same_recipe(
    fleet: LocalStack, cutfleet: Run, store: Store, places: Places
) -> None:
    put_images(store, places, 1)
    first = cutfleet("submit", places.source, "--to", places.to, "--wait").stdout.strip()
    cutfleet("render", first, "--recipe", "ebay", "--wait")

    job = cutfleet("submit", places.source, "--to", places.to, "--recipe", "ebay", "--wait").stdout.strip()

    assert json.loads(cutfleet("status", job, "--json").stdout)["skipped"] == 1


def test_a_missing_cutout_fails_and_a_job_without_cutouts_is_refused(
    fleet: LocalStack, cutfleet: Run, store: Store, places: Places
) -> None:
    names = put_images(store, places, 1)
    first = cutfleet("submit", places.source, "--to", places.to, "--wait").stdout.strip()
    waiting = cutfleet("submit", places.source, "--to", places.to, "--model", "u2net").stdout.strip()
    delete_object(store, places.cutout(names[0]))

    missing = cutfleet("render", first, "--recipe", "ebay", "--wait")
    refused = cutfleet("render", waiting, "--recipe", "ebay")
    as_model = cutfleet("submit", places.source, "--to", places.to, "--model", "render")

    assert missing.returncode == 1
    assert "\tcutout_missing\t" in cutfleet("status", missing.stdout.strip(), "--failed").stdout
    assert (refused.returncode, as_model.returncode) == (2, 2)
    assert "[nothing_to_render]" in refused.stderr and "cutfleet render JOB" in as_model.stderr


def test_a_live_job_can_be_rendered(fleet: LocalStack, cutfleet: Run, store: Store, places: Places) -> None:
    names = put_images(store, places, 1)
    live = cutfleet("submit", places.source, *names, "--to", places.to, "--lane", "live", "--wait").stdout.strip()

    rendered = cutfleet("render", live, "--recipe", "ebay", "--wait")

    assert rendered.returncode == 0, rendered.stderr


def test_an_open_live_job_can_be_rendered(
    fleet: LocalStack, cutfleet: Run, store: Store, ledger: Ledger, places: Places
) -> None:
    wait_past_midnight()
    names = put_images(store, places, 2)
    request = Request(
        source=places.source_location,
        destination=places.destination,
        recipe=Recipe(),
        lane="live",
        name="",
        keys=None,
    )
    day = draft_job(request, job_id="20260101-rendered-while-open", watch="rendered", store=store)
    rows = [
        ("d" * 8 + name, "", "e", *live_row(index, S3Object(name, "", -1), day)) for index, name in enumerate(names)
    ]
    assert ledger.watches.append_images(day, rows, lease_s=60) is Appended.OK
    wait_until(lambda: ledger.jobs.get(day.id).done == 2, what="both images are done")
    assert (ledger.jobs.get(day.id).closed, ledger.jobs.get(day.id).parts) == (None, 0)

    rendered = cutfleet("render", day.id, "--recipe", "ebay", "--wait")

    assert rendered.returncode == 0, rendered.stderr
    assert ledger.jobs.get(rendered.stdout.strip()).done == 2
    ledger.jobs.cancel(day.id)
