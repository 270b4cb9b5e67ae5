"""Publishing the results of one image to S3, beside objects of dead workers, of other sources and of newer claims."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest

from jobs.errors import OutputError, TransientError
from jobs.recipe import Recipe, Rendition
from jobs.s3.client import Store
from jobs.s3.location import Location
from jobs.s3.names import image_paths, rendition_paths, source_digest
from tests.support.places import Places, delete_object
from workers.imaging.pipeline import Outputs
from workers.imaging.renditions import Encoded
from workers.tasks.publish import Existing, Provenance, Target, find_existing, is_complete, publish

RECIPE = Recipe(renditions=(Rendition(name="shop", path="shop/{stem}.jpg"), Rendition(name="web", format="webp")))


def outputs(version: bytes = b"1") -> Outputs:
    return Outputs(
        cutout=b"cutout" + version,
        mask=b"mask" + version,
        width=1,
        height=1,
        quality={"pieces": 1.0},
        review=(),
        notes=(),
        seconds={},
        renditions={name: Encoded(name.encode() + version, "image/jpeg") for name in ("shop", "web")},
    )


def make_target(places: Places, key: str = "a.jpg") -> Target:
    return Target(
        paths=image_paths(places.source_location, places.destination, key),
        renditions=rendition_paths(RECIPE, places.source_location, places.destination, key),
        recipe=RECIPE,
        conditional=True,
    )


def provenance(target: Target) -> Provenance:
    return Provenance(
        source=source_digest(target.paths.source),
        source_etag="e",
        fingerprint="f-f",
        model="m",
        revision="r",
        licence="l",
        job="j1",
    )


def put(store: Store, target: Target, made: Outputs, *, existing: Existing | None = None, is_ours: bool = True) -> None:
    publish(
        made,
        target,
        provenance(target),
        store=store,
        existing=existing or find_existing(target, store),
        is_ours=lambda: is_ours,
    )


def read_renditions(store: Store, target: Target) -> tuple[bytes, bytes]:
    shop, web = (store.get(target.renditions[name], role="output", max_bytes=99)[0] for name in ("shop", "web"))
    return shop, web


def test_published_outputs_are_complete(store: Store, places: Places) -> None:
    target = make_target(places)

    put(store, target, outputs())

    assert is_complete(find_existing(target, store), provenance(target), target, store)
    assert read_renditions(store, target) == (b"shop1", b"web1")


def test_renditions_of_a_worker_that_died_before_its_cutout_are_replaced(store: Store, places: Places) -> None:
    target = make_target(places)
    without_cutout = dataclasses.replace(
        target, paths=dataclasses.replace(target.paths, cutout=places.key("elsewhere.png"))
    )
    put(store, without_cutout, outputs(b"0"))

    put(store, target, outputs(b"1"), existing=Existing(cutout=None, renditions={}))

    assert read_renditions(store, target) == (b"shop1", b"web1")
    assert is_complete(find_existing(target, store), provenance(target), target, store)


def test_a_worker_whose_lease_is_lost_overwrites_no_rendition(store: Store, places: Places) -> None:
    target = make_target(places)
    before = find_existing(target, store)
    put(store, target, outputs(b"2"))

    with pytest.raises(TransientError) as caught:
        put(store, target, outputs(b"1"), existing=before, is_ours=False)

    assert caught.value.code == "output_conflict"
    assert read_renditions(store, target) == (b"shop2", b"web2")


def test_a_rendition_of_another_source_is_found_before_anything_is_computed(store: Store, places: Places) -> None:
    put(store, make_target(places, "a.jpg"), outputs())

    with pytest.raises(OutputError, match=r"shop/a\.jpg") as caught:
        find_existing(make_target(places, "a.png"), store)

    assert caught.value.code == "name_taken"


def test_of_two_sources_with_one_rendition_name_the_first_is_published_and_nothing_of_the_second(
    store: Store, places: Places
) -> None:
    first, second = make_target(places, "a.jpg"), make_target(places, "a.png")
    existing = find_existing(second, store)
    put(store, first, outputs(b"1"))

    with pytest.raises(OutputError) as caught:
        put(store, second, outputs(b"2"), existing=existing)

    assert caught.value.code == "name_taken"
    assert read_renditions(store, first)[0] == b"shop1"
    assert store.head(second.paths.mask, role="output") is None
    assert store.head(second.renditions["web"], role="output") is None


@pytest.mark.parametrize(
    ("path", "key"), [("{stem}.jpg", "cutouts/a.png"), ("{stem}.jpg", "_cutfleet/a.png"), ("{stem}.jpg", "masks/a.gif")]
)
def test_a_rendition_in_one_of_our_own_folders_is_refused(path: str, key: str) -> None:
    recipe = Recipe(renditions=(Rendition(name="a", path=path),))

    with pytest.raises(OutputError) as caught:
        rendition_paths(recipe, Location("in", ""), Location("out", ""), key)

    assert caught.value.code == "name_taken"


def test_two_renditions_of_one_image_with_one_name_are_refused() -> None:
    recipe = Recipe(
        key_pattern="(?P<sku>[a-z]+)",
        renditions=(Rendition(name="a", path="{stem}.jpg"), Rendition(name="b", path="{sku}.jpg")),
    )

    with pytest.raises(OutputError, match="taken"):
        rendition_paths(recipe, Location("in", ""), Location("out", ""), "shoe.png")
    assert len(rendition_paths(recipe, Location("in", ""), Location("out", ""), "shoe7.png")) == 2


@pytest.mark.parametrize("deleted", ["mask", "cutout"])
def test_a_deleted_output_is_written_again(aws: Store, deleted: Literal["mask", "cutout"]) -> None:
    """A conditional write over a deleted object gets 404 from AWS, not 412. The cutout is missed only by the next
    attempt."""
    places = Places("s3://in/", "s3://out/")
    aws.create_bucket("out")
    target = make_target(places)
    put(aws, target, outputs(b"1"))
    existing = find_existing(target, aws)
    delete_object(aws, target.paths.mask if deleted == "mask" else target.paths.cutout)

    if deleted == "cutout":
        with pytest.raises(TransientError, match="Another process") as caught:
            put(aws, target, outputs(b"2"), existing=existing)
        assert caught.value.code == "output_conflict"
    put(aws, target, outputs(b"2"))

    assert is_complete(find_existing(target, aws), provenance(target), target, aws)
