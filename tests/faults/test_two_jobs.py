"""Two jobs write to one destination at once: no image is published twice, and every pair of outputs is complete."""

from __future__ import annotations

from pathlib import Path

from tests.faults.fleet import IMAGES, Fleet, Reference
from tests.faults.invariants import assert_exact
from tests.support.images import put_images
from tests.support.places import Places


def test_two_equal_jobs_at_once_publish_each_image_once(fleet: Fleet, places: Places, reference: Reference) -> None:
    names = put_images(fleet.store, places, IMAGES)
    for _ in range(2):
        fleet.workers.start()
    jobs = [fleet.submit(places), fleet.submit(places)]
    with fleet.dispatcher():
        outcomes = [assert_exact(fleet, job, places, names=names, reference=reference, only_job=False) for job in jobs]

    assert sum(outcome.counts["done"] for outcome in outcomes) == IMAGES
    assert sum(outcome.counts["skipped"] for outcome in outcomes) == IMAGES
    assert set(fleet.workers.publish_counts(places).values()) == {1}
    fleet.workers.terminate()


def test_with_two_recipes_at_once_both_outputs_of_an_image_are_by_the_same_recipe(
    fleet: Fleet, places: Places, reference: Reference, tmp_path: Path
) -> None:
    names = put_images(fleet.store, places, 12)
    other = tmp_path / "other.toml"
    other.write_text('model = "stand-in"\nedges = "off"\n')
    fleet.workers.start()
    jobs = [fleet.submit(places), fleet.submit(places, "--recipe", str(other))]
    fleet.workers.start()
    with fleet.dispatcher():
        for job in jobs:
            counts = assert_exact(fleet, job, places, names=names, reference=reference, only_job=False).counts
            assert counts["done"] == len(names)

    recipes = {job: fleet.ledger.jobs.get(job).recipe.rendition_fingerprint() for job in jobs}
    assert len(set(recipes.values())) == 2
    for name in names:
        cutout = fleet.store.head(places.cutout(name), role="output")
        assert cutout is not None
        assert cutout.metadata["cf-fingerprint"].endswith(recipes[cutout.metadata["cf-job"]])
    fleet.workers.terminate()
