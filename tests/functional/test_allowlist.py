"""Submissions outside `CUTFLEET_SOURCES` and `CUTFLEET_DESTINATIONS` are refused before anything is recorded."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.allowlist import Allowlist
from jobs.errors import ImageError
from jobs.job import ImageState
from jobs.ledger import Ledger
from jobs.message import Lane
from jobs.recipe import Recipe
from jobs.s3.client import Store
from jobs.s3.location import Location, parse_destination
from producer.api import service
from producer.api.background_listing import request_of
from producer.audit.auditor import audit
from producer.demo.local_stack import LocalStack
from producer.ingest.notifications import Arrival
from producer.ingest.watcher import Watcher
from producer.submission.request import Request
from producer.submission.rerender import submit_rerender
from producer.submission.submit import draft_job, resume, submit
from tests.support.environment import Run
from tests.support.images import put_images
from tests.support.places import Places

MODEL = "u2net"
"""No worker serves it: images stay open."""
USAGE = 2


@pytest.fixture
def limited_store(stack: LocalStack, places: Places) -> Iterator[Store]:
    """A store that allows only s3://SOURCE/ours/ and s3://RESULTS/ours/."""
    allowlist = Allowlist((f"{places.source}ours/",), (f"{places.to}ours/",))
    endpoint, credentials = stack.environment["CUTFLEET_S3_ENDPOINT"], (*stack.keys, "us-east-1")
    with Store(endpoint, connections=24, credentials=credentials, allowlist=allowlist) as store:
        yield store


def request_for(source: str, to: str, *keys: str, lane: Lane = "live", manifest: Path | None = None) -> Request:
    return Request(
        source=Location.parse(source),
        destination=parse_destination(to),
        recipe=Recipe(model=MODEL),
        lane=lane,
        name="",
        keys=keys or None,
        manifest=str(manifest) if manifest else None,
    )


@pytest.fixture(params=["submit", "api", "watch"])
def submit_by(request: pytest.FixtureRequest, limited_store: Store, ledger: Ledger) -> Callable[[Request], object]:
    """Each way to submit images."""

    def by_submit(submission: Request) -> object:
        return submit(submission, store=limited_store, ledger=ledger, lease_s=60, listed=lambda _: None)

    def by_api(submission: Request) -> object:
        return service.submit(submission, "20261125-api-never", store=limited_store, ledger=ledger, lease_s=60)

    def by_watch(submission: Request) -> object:
        return Watcher(submission, store=limited_store, ledger=ledger, lease_s=60)

    return {"submit": by_submit, "api": by_api, "watch": by_watch}[request.param]


@pytest.mark.parametrize("prefix", ["", "our", "ours", "ours-too/", "/ours/", "ours/../theirs/"])
def test_no_submission_takes_a_source_or_destination_outside_the_allowlist(
    submit_by: Callable[[Request], object], store: Store, places: Places, prefix: str
) -> None:
    ours = Places(f"{places.source}ours/", f"{places.to}ours/")

    with pytest.raises(ImageError) as of_source:
        submit_by(request_for(places.source + prefix, ours.to))
    assert of_source.value.code == "source_not_allowed"
    if prefix != "ours":  # a destination gets a final slash
        with pytest.raises(ImageError) as of_destination:
            submit_by(request_for(ours.source, places.to + prefix))
        assert of_destination.value.code == "output_not_allowed"

    assert not any(objects for objects, _ in store.list_pages(places.destination, role="output"))


def test_the_error_names_the_setting(cutfleet: Run, store: Store, places: Places) -> None:
    ours = Places(f"{places.source}ours/", f"{places.to}ours/")
    put_images(store, ours, 1)
    env = {"CUTFLEET_SOURCES": ours.source, "CUTFLEET_DESTINATIONS": ours.to}
    (refused, with_parent_segment, accepted) = (
        cutfleet("submit", source, *keys, "--to", ours.to, "--model", MODEL, env=env)
        for source, *keys in (
            (places.source,),
            (ours.source, "ours/../theirs/x.jpg"),
            (ours.source, "ours/p00000.jpg"),
        )
    )

    for ran in (refused, with_parent_segment):
        assert ran.returncode == USAGE
        assert ran.stderr.count("\n") == 1
        assert "CUTFLEET_SOURCES" in ran.stderr
        assert "[source_not_allowed]" in ran.stderr
    assert accepted.returncode == 0, accepted.stderr


def test_a_manifest_line_outside_the_allowlist_is_a_bad_line(
    limited_store: Store, ledger: Ledger, places: Places, tmp_path: Path
) -> None:
    ours = Places(f"{places.source}ours/", f"{places.to}ours/")
    manifest = tmp_path / "keys.csv"
    bucket = places.source_location.bucket
    manifest.write_text(f"{bucket},ours/a.jpg\n{bucket},ours/%2E%2E/b.jpg\n{bucket},ours/%252E%252E/c.jpg\n")
    reported: list[tuple[int, str]] = []
    request = request_for(ours.source, ours.to, lane="backfill", manifest=manifest)
    request = dataclasses.replace(request, bad_line=lambda number, reason: reported.append((number, reason)))

    job = submit(request, store=limited_store, ledger=ledger, lease_s=60, listed=lambda _: None)

    assert job.total == 2, "keys are decoded once: the last one is a valid key"
    assert [number for number, _ in reported] == [2]
    assert "CUTFLEET_SOURCES" in reported[0][1]
    ledger.jobs.cancel(job.id)


def test_an_arrival_outside_the_allowlist_is_left_out(
    limited_store: Store, ledger: Ledger, places: Places, caplog: pytest.LogCaptureFixture
) -> None:
    watcher = Watcher(
        request_for(f"{places.source}ours/", f"{places.to}ours/"), store=limited_store, ledger=ledger, lease_s=60
    )

    with caplog.at_level(logging.WARNING):
        taken = watcher.take(
            Arrival(places.key(key), f"e{key}", 9) for key in ("ours/a.jpg", "ours/../b.jpg", "theirs/c.jpg")
        )

    assert taken == 1
    assert [vars(row)["code"] for row in caplog.records if "left out" in row.message] == ["source_not_allowed"]


def test_an_earlier_job_outside_the_allowlist_is_neither_resumed_nor_rendered_again(
    limited_store: Store, store: Store, ledger: Ledger, places: Places
) -> None:
    put_images(store, places, 1)
    done = submit(request_for(places.source, places.to), store=store, ledger=ledger, lease_s=60, listed=lambda _: None)
    claim = ledger.window.claim(f"{done.id}:0", token="t", output="s3://x/y", lease_s=60)
    ledger.window.finish(claim, ImageState.DONE)
    begun = draft_job(request_for(places.source, places.to, lane="backfill"), job_id=f"{done.id}-2", store=store)
    ledger.jobs.create(begun)

    with pytest.raises(ImageError, match="CUTFLEET_SOURCES"):
        resume(begun.id, request_of(begun), store=limited_store, ledger=ledger, listed=lambda _: None)
    with pytest.raises(ImageError, match="CUTFLEET_SOURCES"):
        submit_rerender(
            done, Recipe(), lane="live", store=limited_store, ledger=ledger, lease_s=60, listed=lambda _: None
        )

    ledger.jobs.cancel(begun.id)


def test_a_forged_record_outside_the_allowlist_is_not_rebuilt(
    limited_store: Store, store: Store, ledger: Ledger, places: Places
) -> None:
    job = draft_job(request_for(places.source, f"{places.to}ours/"), job_id="20261125-forged", store=store)
    folder = job.record_path("")

    with pytest.raises(ImageError, match="CUTFLEET_SOURCES"):
        list(audit(str(folder), repair=True, deep=False, ledger=ledger, store=limited_store, seen=lambda _: None))

    assert ledger.jobs.find(job.id) is None
