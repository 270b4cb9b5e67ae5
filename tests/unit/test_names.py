"""Locations, and the names of a job's objects."""

from __future__ import annotations

import pytest

from jobs.errors import OutputError, SettingsError
from jobs.job import Job, JobKind
from jobs.recipe import Recipe, Rendition
from jobs.s3.location import Location, parse_destination
from jobs.s3.names import image_paths, rendition_paths


@pytest.mark.parametrize(
    ("source", "key", "relative"),
    [
        ("s3://in/photos/", "photos/a.jpg", "a.jpg"),
        ("s3://in/photos/", "photos/2024/a.jpg", "2024/a.jpg"),
        ("s3://in/photos", "photos-old/a.jpg", "photos-old/a.jpg"),
        ("s3://in/photos/20", "photos/2024/a.jpg", "2024/a.jpg"),
        ("s3://in/", "a.jpg", "a.jpg"),
        ("s3://in", "deep/a b+%é.jpg", "deep/a b+%é.jpg"),
    ],
)
def test_names_are_relative_to_the_last_slash_of_the_prefix(source: str, key: str, relative: str) -> None:
    paths = image_paths(Location.parse(source), parse_destination("s3://out/made"), key)

    assert str(paths.cutout) == f"s3://out/made/cutouts/{relative}.png"
    assert str(paths.mask) == f"s3://out/made/masks/{relative}.png"


def test_two_formats_of_one_image_have_different_outputs() -> None:
    jpeg, png = (image_paths(Location("in", ""), Location("out", ""), f"a.{extension}") for extension in ("jpg", "png"))

    assert jpeg.cutout != png.cutout and jpeg.mask != png.mask


def test_a_name_too_long_for_s3_is_refused() -> None:
    with pytest.raises(OutputError, match="1024") as caught:
        rendition_paths(Recipe(), Location("in", ""), Location("out", "d" * 100 + "/"), "k" * 1000)

    assert caught.value.code == "name_too_long"


@pytest.mark.parametrize("uri", ["in/photos", "s3:/in", "s3://", "https://in/photos"])
def test_text_that_is_not_an_s3_uri_is_refused(uri: str) -> None:
    with pytest.raises(SettingsError, match="s3://BUCKET/PREFIX"):
        Location.parse(uri)


@pytest.mark.parametrize(
    ("uri", "key"), [("s3://out", ""), ("s3://out/", ""), ("s3://out/made", "made/"), ("s3://out/made///", "made/")]
)
def test_a_destination_ends_with_one_slash(uri: str, key: str) -> None:
    assert parse_destination(uri) == Location("out", key)


def test_a_job_knows_the_names_of_an_images_objects() -> None:
    recipe = Recipe(renditions=(Rendition(name="web"),))
    job = Job(
        id="j1",
        name="",
        source=Location("in", "photos/"),
        destination=Location("out", "made/"),
        recipe_json=recipe.to_json(),
        model="u2netp",
        lane="backfill",
        conditional=True,
        created=0.0,
    )
    preview = Job.from_fields("j2", job.to_fields() | {"created": "0", "kind": "preview", "review_of": "j1"})

    assert str(job.paths("photos/a.jpg").cutout) == "s3://out/made/cutouts/a.jpg.png"
    assert {name: str(path) for name, path in job.rendition_paths("photos/a.jpg").items()} == {
        "web": "s3://out/made/web/a.jpg.jpg"
    }
    assert str(job.record_path("job.json")) == "s3://out/made/_cutfleet/j1/job.json"
    assert preview.kind is JobKind.PREVIEW
    assert str(preview.preview_path("photos/a.jpg")).startswith("s3://out/made/_cutfleet/j1/review/")


def test_a_job_survives_its_fields() -> None:
    job = Job.from_fields(
        "j1",
        {
            "name": "n",
            "source": "s3://in/photos/",
            "destination": "s3://out/",
            "recipe": Recipe().to_json(),
            "model": "u2netp",
            "lane": "live",
            "conditional": "1",
            "created": "12.5",
            "rate": "2.5",
            "webhook": "https://x/",
            "webhook_images": "1",
            "total": "7",
            "cancelled": "2",
        },
    )

    assert (job.rate, job.total, job.cancelled_images, job.cancelled, job.webhook_images) == (2.5, 7, 2, False, True)
    kept = Job.from_fields("j1", job.to_fields() | {"created": "12.5", "total": "7", "cancelled": "2"})
    assert kept == job
