"""Whatever asks for images is refused what `CUTFLEET_SOURCES` and `CUTFLEET_DESTINATIONS` do not allow, before
anything is recorded."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.allowlist import Bounds
from jobs.errors import ImageError
from jobs.job import ImageState
from jobs.ledger import Ledger
from jobs.message import Lane
from jobs.recipe import Recipe
from jobs.s3.client import Location, Store, record_location
from producer.api import service as requests
from producer.api.background_listing import request_of
from producer.audit.auditor import audit
from producer.demo.local_stack import LocalStack
from producer.ingest.notifications import Arrival
from producer.ingest.watcher import Watcher
from producer.submission.rerender import render
from producer.submission.submit import Request, draft, resume, submit
from tests.support.environment import Run
from tests.support.factories import Places, put_images

MODEL = "u2net"
"""Nobody serves it: images stay open."""
USAGE = 2


@pytest.fixture
def bounded(stack: LocalStack, places: Places) -> Iterator[Store]:
    """May read s3://SOURCE/ours/ and write s3://RESULTS/ours/."""
    bounds = Bounds((f"{places.source}ours/",), (f"{places.to}ours/",))
    endpoint, credentials = stack.environment["CUTFLEET_S3_ENDPOINT"], (*stack.keys, "us-east-1")
    with Store(endpoint, connections=24, credentials=credentials, bounds=bounds) as store:
        yield store


def asked(source: str, to: str, *keys: str, lane: Lane = "live", manifest: Path | None = None) -> Request:
    return Request(
        source=source,
        destination=to,
        recipe=Recipe(model=MODEL),
        lane=lane,
        name="",
        keys=keys or None,
        manifest=str(manifest) if manifest else None,
    )


@pytest.fixture(params=["submit", "api", "watch"])
def ask(request: pytest.FixtureRequest, bounded: Store, ledger: Ledger) -> Callable[[Request], object]:
    """The ways in."""

    def by_submit(wanted: Request) -> object:
        return submit(wanted, store=bounded, ledger=ledger, lease_s=60, listed=lambda _: None)

    def by_api(wanted: Request) -> object:
        return requests.submit(wanted, "20261125-api-never", store=bounded, ledger=ledger, lease_s=60)

    def by_watch(wanted: Request) -> object:
        return Watcher(wanted, store=bounded, ledger=ledger, lease_s=60)

    return {"submit": by_submit, "api": by_api, "watch": by_watch}[request.param]


@pytest.mark.parametrize("prefix", ["", "our", "ours", "ours-too/", "/ours/", "ours/../theirs/"])
def test_no_way_in_takes_a_source_or_a_destination_beside_those_allowed(
    ask: Callable[[Request], object], store: Store, places: Places, prefix: str
) -> None:
    ours = Places(f"{places.source}ours/", f"{places.to}ours/")

    with pytest.raises(ImageError) as of_source:
        ask(asked(places.source + prefix, ours.to))
    assert of_source.value.code == "source_not_allowed"
    if prefix != "ours":  # a destination gets its slash
        with pytest.raises(ImageError) as of_destination:
            ask(asked(ours.source, places.to + prefix))
        assert of_destination.value.code == "output_not_allowed"

    assert not any(objects for objects, _ in store.list_pages(Location.parse(places.to), role="output"))


def test_the_command_says_which_setting_and_where_it_is_changed(cutfleet: Run, store: Store, places: Places) -> None:
    ours = Places(f"{places.source}ours/", f"{places.to}ours/")
    put_images(store, ours, 1)
    env = {"CUTFLEET_SOURCES": ours.source, "CUTFLEET_DESTINATIONS": ours.to}
    (refused, climbs, taken) = (
        cutfleet("submit", source, *keys, "--to", ours.to, "--model", MODEL, env=env)
        for source, *keys in (
            (places.source,),
            (ours.source, "ours/../theirs/x.jpg"),
            (ours.source, "ours/p00000.jpg"),
        )
    )

    for ran in (refused, climbs):
        assert ran.returncode == USAGE
        assert ran.stderr.count("\n") == 1
        assert "CUTFLEET_SOURCES" in ran.stderr
        assert "[source_not_allowed]" in ran.stderr
    assert taken.returncode == 0, taken.stderr


def test_a_line_of_a_manifest_that_leads_elsewhere_is_a_bad_line(
    bounded: Store, ledger: Ledger, places: Places, tmp_path: Path
) -> None:
    ours = Places(f"{places.source}ours/", f"{places.to}ours/")
    manifest = tmp_path / "keys.csv"
    bucket = Location.parse(places.source).bucket
    manifest.write_text(f"{bucket},ours/a.jpg\n{bucket},ours/%2E%2E/b.jpg\n{bucket},ours/%252E%252E/c.jpg\n")
    told: list[tuple[int, str]] = []
    request = asked(ours.source, ours.to, lane="backfill", manifest=manifest)
    request = dataclasses.replace(request, bad_line=lambda number, reason: told.append((number, reason)))

    job = submit(request, store=bounded, ledger=ledger, lease_s=60, listed=lambda _: None)

    assert job.total == 2, "the last one is a name like any other: nothing is decoded twice"
    assert [number for number, _ in told] == [2]
    assert "CUTFLEET_SOURCES" in told[0][1]
    ledger.cancel(job.id)


def test_an_arrival_that_leads_elsewhere_is_left_out_and_the_others_are_taken(
    bounded: Store, ledger: Ledger, places: Places, caplog: pytest.LogCaptureFixture
) -> None:
    watcher = Watcher(asked(f"{places.source}ours/", f"{places.to}ours/"), store=bounded, ledger=ledger, lease_s=60)
    bucket = Location.parse(places.source).bucket

    with caplog.at_level(logging.WARNING):
        taken = watcher.take(
            Arrival(bucket, key, f"e{key}", 9) for key in ("ours/a.jpg", "ours/../b.jpg", "theirs/c.jpg")
        )

    assert taken == 1
    assert [vars(row)["code"] for row in caplog.records if "left out" in row.message] == ["source_not_allowed"]


def test_a_job_of_before_is_not_listed_on_nor_rendered_again(
    bounded: Store, store: Store, ledger: Ledger, places: Places
) -> None:
    put_images(store, places, 1)
    done = submit(asked(places.source, places.to), store=store, ledger=ledger, lease_s=60, listed=lambda _: None)
    claim = ledger.claim(f"{done.id}:0", token="t", output="s3://x/y", lease_s=60)
    ledger.finish(claim, ImageState.DONE)
    begun = draft(asked(places.source, places.to, lane="backfill"), job_id=f"{done.id}-2", store=store)
    ledger.create_job(begun)

    with pytest.raises(ImageError, match="CUTFLEET_SOURCES"):
        resume(begun.id, request_of(begun), store=bounded, ledger=ledger, listed=lambda _: None)
    with pytest.raises(ImageError, match="CUTFLEET_SOURCES"):
        render(done, Recipe(), lane="live", store=bounded, ledger=ledger, lease_s=60, listed=lambda _: None)

    ledger.cancel(begun.id)


def test_a_record_that_somebody_wrote_into_s3_is_not_rebuilt(
    bounded: Store, store: Store, ledger: Ledger, places: Places
) -> None:
    job = draft(asked(places.source, f"{places.to}ours/"), job_id="20261125-forged", store=store)
    place = record_location(job.destination, job.id, "")

    with pytest.raises(ImageError, match="CUTFLEET_SOURCES"):
        list(audit(str(place), repair=True, deep=False, ledger=ledger, store=bounded, seen=lambda _: None))

    assert ledger.find_job(job.id) is None
