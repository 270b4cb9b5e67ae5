"""Putting results into S3, step by step: what another worker left, and what may not be overwritten."""

from __future__ import annotations

import dataclasses

import pytest

from jobs.errors import OutputError, TransientError
from jobs.recipe import Recipe, Rendition
from jobs.s3.client import Names, Store, image_names, rendition_names, source_digest
from tests.support.factories import Places
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


def target(places: Places, key: str = "a.jpg") -> Target:
    return Target(
        names=image_names(places.source, places.to, key),
        renditions=rendition_names(RECIPE, places.source, places.to, key),
        recipe=RECIPE,
        conditional=True,
    )


def provenance(names: Names, job: str = "j1") -> Provenance:
    return Provenance(
        source=source_digest(names.source),
        source_etag="e",
        fingerprint="f-f",
        model="m",
        revision="r",
        licence="l",
        job=job,
    )


def put(store: Store, to: Target, made: Outputs, *, existing: Existing | None = None, ours: bool = True) -> None:
    publish(
        made,
        to,
        provenance(to.names),
        store=store,
        existing=existing or find_existing(to, store),
        is_ours=lambda: ours,
    )


def body(store: Store, to: Target, name: str) -> bytes:
    return store.get(to.renditions[name], role="output", max_bytes=99)[0]


def test_all_is_there_once_the_cutout_is(store: Store, places: Places) -> None:
    to = target(places)

    put(store, to, outputs())

    existing = find_existing(to, store)
    assert is_complete(existing, provenance(to.names), to, store)
    assert (body(store, to, "shop"), body(store, to, "web")) == (b"shop1", b"web1")


def test_renditions_of_a_worker_that_died_before_its_cutout_are_replaced(store: Store, places: Places) -> None:
    to = target(places)
    died = dataclasses.replace(to, names=dataclasses.replace(to.names, cutout=places.key("elsewhere.png")))
    put(store, died, outputs(b"0"))

    put(store, to, outputs(b"1"), existing=Existing(cutout=None, renditions={}))

    assert (body(store, to, "shop"), body(store, to, "web")) == (b"shop1", b"web1")
    assert is_complete(find_existing(to, store), provenance(to.names), to, store)


def test_a_worker_whose_claim_has_ended_overwrites_no_rendition(store: Store, places: Places) -> None:
    to = target(places)
    before = find_existing(to, store)
    put(store, to, outputs(b"2"))

    with pytest.raises(TransientError) as caught:
        put(store, to, outputs(b"1"), existing=before, ours=False)

    assert caught.value.code == "output_conflict"
    assert (body(store, to, "shop"), body(store, to, "web")) == (b"shop2", b"web2")


def test_a_rendition_of_another_source_is_refused_before_anything_is_made(store: Store, places: Places) -> None:
    put(store, target(places, "a.jpg"), outputs())

    with pytest.raises(OutputError, match=r"shop/a\.jpg") as caught:
        find_existing(target(places, "a.png"), store)

    assert caught.value.code == "name_taken"


def test_two_sources_that_come_to_one_name_at_once_leave_one_and_nothing_of_the_other(
    store: Store, places: Places
) -> None:
    first, second = target(places, "a.jpg"), target(places, "a.png")
    nothing = find_existing(second, store)
    put(store, first, outputs(b"1"))

    with pytest.raises(OutputError) as caught:
        put(store, second, outputs(b"2"), existing=nothing)

    assert caught.value.code == "name_taken"
    assert body(store, first, "shop") == b"shop1"
    assert store.head(second.names.mask, role="output") is None
    assert store.head(second.renditions["web"], role="output") is None


@pytest.mark.parametrize(
    ("path", "key"), [("{stem}.jpg", "cutouts/a.png"), ("{stem}.jpg", "_cutfleet/a.png"), ("{stem}.jpg", "masks/a.gif")]
)
def test_no_rendition_goes_into_our_own_folders(path: str, key: str) -> None:
    recipe = Recipe(renditions=(Rendition(name="a", path=path),))

    with pytest.raises(OutputError) as caught:
        rendition_names(recipe, "s3://in/", "s3://out/", key)

    assert caught.value.code == "name_taken"


def test_two_renditions_of_one_image_with_one_name_are_refused() -> None:
    recipe = Recipe(
        key_pattern="(?P<sku>[a-z]+)",
        renditions=(Rendition(name="a", path="{stem}.jpg"), Rendition(name="b", path="{sku}.jpg")),
    )

    with pytest.raises(OutputError, match="taken"):
        rendition_names(recipe, "s3://in/", "s3://out/", "shoe.png")
    assert len(rendition_names(recipe, "s3://in/", "s3://out/", "shoe7.png")) == 2


@pytest.mark.parametrize("gone", ["mask", "cutout"])
def test_what_was_deleted_beside_the_rest_is_made_again_or_tried_again(aws: Store, gone: str) -> None:
    """AWS answers a write over what is gone with 404, not with 412."""
    places = Places("s3://in/", "s3://out/")
    aws.create_bucket("out")
    to = target(places)
    put(aws, to, outputs(b"1"))
    existing = find_existing(to, aws)
    aws._s3.delete_object(Bucket="out", Key=getattr(to.names, gone).key)

    if gone == "cutout":  # since the claim; the next try finds nothing there
        with pytest.raises(TransientError, match="somebody else") as caught:
            put(aws, to, outputs(b"2"), existing=existing)
        assert caught.value.code == "output_conflict"
    put(aws, to, outputs(b"2"))

    assert is_complete(find_existing(to, aws), provenance(to.names), to, aws)
