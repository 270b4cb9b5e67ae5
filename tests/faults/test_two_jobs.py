"""Two jobs write to one destination at once: nothing is published twice, and what stands there in the end is whole."""

from __future__ import annotations

from pathlib import Path

from jobs.recipe import Recipe
from tests.faults.fleet import IMAGES, Fleet, Reference
from tests.faults.terms import MODEL
from tests.faults.truth import prove
from tests.support.factories import Places, put_images


def submit(fleet: Fleet, places: Places, *more: str) -> str:
    ran = fleet.run("submit", places.source, "--to", places.to, "--model", MODEL, *more)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_the_same_twice_at_once_is_published_once(fleet: Fleet, places: Places, reference: Reference) -> None:
    names = put_images(fleet.store, places, IMAGES)
    for _ in range(2):
        fleet.workers.start()
    jobs = [submit(fleet, places), submit(fleet, places)]
    with fleet.dispatcher():
        truths = [prove(fleet, job, places, names=names, reference=reference, alone=False) for job in jobs]

    assert sum(truth.counts["done"] for truth in truths) == IMAGES
    assert sum(truth.counts["skipped"] for truth in truths) == IMAGES
    assert set(fleet.workers.published(places).values()) == {1}
    fleet.workers.dismiss()


def test_of_two_recipes_at_once_each_image_is_whole_by_the_one_that_came_last(
    fleet: Fleet, places: Places, reference: Reference, tmp_path: Path
) -> None:
    names = put_images(fleet.store, places, 12)
    other = tmp_path / "other.toml"
    other.write_text('model = "stand-in"\nedges = "off"\n')
    fleet.workers.start()
    jobs = [submit(fleet, places), submit(fleet, places, "--recipe", str(other))]
    fleet.workers.start()
    with fleet.dispatcher():
        for job in jobs:
            counts = prove(fleet, job, places, names=names, reference=reference, alone=False).counts
            assert counts["done"] == len(names)

    recipes = {job: Recipe.from_json(fleet.ledger.job(job).recipe).rendition_fingerprint() for job in jobs}
    assert len(set(recipes.values())) == 2
    for name in names:
        cutout = fleet.store.head(places.cutout(name), role="output")
        assert cutout is not None
        assert cutout.metadata["cf-fingerprint"].endswith(recipes[cutout.metadata["cf-job"]])
    fleet.workers.dismiss()
