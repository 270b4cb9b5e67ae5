"""Cancelling a job: images in work finish, all others become final at once."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

import pytest

from jobs.errors import JobError
from jobs.job import ImageState, Job, ManifestPart
from jobs.ledger import Ledger
from jobs.ledger.connection import Connection, Fenced
from jobs.ledger.window import ClaimOutcome, Recorded
from jobs.recipe import Recipe
from jobs.s3.client import S3Object, Store
from jobs.settings import Settings
from producer.audit.auditor import audit
from producer.audit.outputs import Disagreement
from producer.console.output import job_lines
from producer.dispatcher.dispatcher import Dispatcher
from producer.records.manifest import PART_ROWS, write_part
from producer.submission.request import Request
from producer.submission.submit import draft_job, resume, submit
from tests.support.places import Places
from tests.support.submissions import submit_keys
from tests.support.work import LEASE_S, assert_window_empty, claim_image, close_job, work_off

LARGE = 1_000_001


@pytest.fixture
def dispatcher(own_ledger: Ledger, store: Store) -> Iterator[Dispatcher]:
    """The active dispatcher, after the pause that follows a start of Redis."""
    elapsed_s = 0.0
    dispatcher = Dispatcher(own_ledger, store, Settings(lease_s=LEASE_S), clock=lambda: time.monotonic() + elapsed_s)
    dispatcher.step()
    elapsed_s = LEASE_S
    yield dispatcher
    dispatcher.close()


@pytest.fixture
def large_job(store: Store, own_ledger: Ledger, places: Places) -> Job:
    """A job of `LARGE` images, all in the ledger. S3 has only the first part of its manifest: the part that is fed."""
    request = Request(
        source=places.source_location,
        destination=places.destination,
        recipe=Recipe(),
        lane="backfill",
        name="",
        keys=None,
    )
    job = draft_job(request, job_id="20260101-000000-000000", store=store)
    own_ledger.jobs.create(job)
    lister = own_ledger.jobs.take_listing(job.id)
    for number in range(math.ceil(LARGE / PART_ROWS)):
        rows = min(PART_ROWS, LARGE - number * PART_ROWS)
        part = ManifestPart(number, "a", "z", rows)
        if number == 0:
            objects = [S3Object(f"{index:05d}.jpg", "e", 1) for index in range(rows)]
            write_part(store, job, part, objects, is_next=lambda: True)
        skipped = [number == 7 and offset % 3 == 0 for offset in range(rows)]
        own_ledger.jobs.add_part(job.id, lister, part, first=number * PART_ROWS, skipped=skipped)
    own_ledger.jobs.finish_listing(job.id)
    return own_ledger.jobs.get(job.id)


def restore(states: dict[int, ImageState], job: Job, ledger: Ledger) -> None:
    rows = list(states.items())
    for first in range(0, len(rows), 50):
        ledger.images.restore(job.id, dict(rows[first : first + 50]))


def test_a_cancelled_job_finishes_the_images_in_work_and_nothing_else(
    own_ledger: Ledger, store: Store, places: Places, dispatcher: Dispatcher
) -> None:
    job = submit_keys(places, own_ledger, store, count=90)
    dispatcher.step()
    work_off(own_ledger, lambda _: ImageState.DONE, limit=20)
    dispatcher.step()
    image, _ = next(own_ledger.window.entries())
    claim = claim_image(image, own_ledger)

    assert own_ledger.jobs.cancel(job.id)
    dispatcher.step()
    assert own_ledger.jobs.get(job.id).open == 1, "a leased image is left to its worker"
    assert claim_image(image, own_ledger).outcome is ClaimOutcome.BUSY
    assert own_ledger.window.finish(claim, ImageState.DONE) is Recorded.OK
    closed = close_job(dispatcher, job, own_ledger)

    assert (closed.done, closed.cancelled_images, closed.window) == (21, 69, 0)
    assert_window_empty(own_ledger)
    assert not own_ledger.jobs.cancel(job.id)
    with pytest.raises(JobError, match="cancelled"):
        own_ledger.images.reopen(job.id, [1], states=[ImageState.FAILED])


def test_an_image_of_a_cancelled_job_that_is_given_a_retry_becomes_final(
    own_ledger: Ledger, store: Store, places: Places, dispatcher: Dispatcher
) -> None:
    job = submit_keys(places, own_ledger, store, count=2)
    dispatcher.step()
    for image, _ in list(own_ledger.window.entries()):
        claim = claim_image(image, own_ledger)
        own_ledger.jobs.cancel(job.id)
        own_ledger.window.retry_later(claim, pause_s=0)

    closed = close_job(dispatcher, job, own_ledger)

    assert closed.cancelled_images == 2
    assert_window_empty(own_ledger)


def test_a_million_images_are_cancelled_in_one_turn_except_final_and_leased_ones(
    own_ledger: Ledger, dispatcher: Dispatcher, large_job: Job
) -> None:
    job = large_job
    indexes = (*range(20_000, 20_100), *range(30_001, 30_400, 7), LARGE - 2)
    restored = {index: ImageState(1 + index % 5) for index in indexes}
    restore(restored, job, own_ledger)
    dispatcher.step()
    claims = [claim_image(image, own_ledger) for image, _ in list(own_ledger.window.entries())[:5]]
    own_ledger.window.retry_later(claims.pop(), pause_s=1000)

    own_ledger.jobs.cancel(job.id)
    dispatcher.step()

    cancelled = own_ledger.jobs.get(job.id)
    assert (cancelled.open, cancelled.window) == (4, 4)
    epoch = int(own_ledger.connection.call("get", "cf:dispatcher:epoch"))
    assert own_ledger.dispatch.cancel_next(epoch, job.id, 0, []) is None, "the cursor is at the end"
    states = own_ledger.images.states(job.id, 0, LARGE + 1)
    others = {index: state for index, state in enumerate(states) if state is not ImageState.CANCELLED}
    leased = {int(claim.image.partition(":")[2]): ImageState.OPEN for claim in claims}
    skipped = {70_000 + offset: ImageState.SKIPPED for offset in range(0, PART_ROWS, 3)}
    final = {index: state for index, state in restored.items() if state is not ImageState.CANCELLED}
    assert others == final | leased | skipped | {LARGE: ImageState.OPEN}, "nothing after the last image is touched"

    own_ledger.window.finish(claims[0], ImageState.DONE)
    own_ledger.window.release(claims[1], lease_s=LEASE_S)
    own_ledger.window.retry_later(claims[2], pause_s=1000)
    own_ledger.window.report_crash(claims[3], "lost", lease_s=LEASE_S)

    ended = own_ledger.jobs.get(job.id)
    assert (ended.open, ended.window) == (0, 0)
    assert "state:     cancelling (its report is being written)" in job_lines(ended)
    assert not own_ledger.jobs.check(job.id, repair=False).counts
    assert_window_empty(own_ledger)


def test_a_cancellation_survives_dispatchers_that_are_killed_at_any_of_its_scripts(
    own_ledger: Ledger, store: Store, places: Places, dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.ledger.dispatch.CANCEL_ROWS", 16)
    monkeypatch.setattr("jobs.ledger.dispatch.FEED_ROWS", 5)
    monkeypatch.setattr("producer.dispatcher.dispatcher.CANCELS_PER_TURN", 2)
    job = submit_keys(places, own_ledger, store, count=81)
    dispatcher.step()
    work_off(own_ledger, lambda _: ImageState.DONE, limit=9)
    image, _ = next(own_ledger.window.entries())
    claim = claim_image(image, own_ledger)
    own_ledger.jobs.cancel(job.id)
    run = Connection.run
    scripts_left = lives = 0

    class Killed(BaseException): ...

    def run_until_killed(self: Connection, script: str, *args: str | int | float | bytes) -> object:
        nonlocal scripts_left
        if script.startswith("cancel_"):
            scripts_left -= 1
            if scripts_left < 0:
                raise Killed
        return run(self, script, *args)

    monkeypatch.setattr(Connection, "run", run_until_killed)
    while own_ledger.jobs.get(job.id).open > 1:
        own_ledger.connection.call("delete", "cf:dispatcher")  # the lock of the killed dispatcher expires
        scripts_left, lives = lives, lives + 1
        with contextlib.suppress(Killed):
            Dispatcher(own_ledger, store, Settings(lease_s=LEASE_S)).step()
        assert own_ledger.jobs.cancel(job.id), "cancelling again changes nothing"
    monkeypatch.undo()
    with pytest.raises(Fenced):
        own_ledger.dispatch.cancel_next(1, job.id, 0, [])
    own_ledger.connection.call("delete", "cf:dispatcher")
    own_ledger.window.finish(claim, ImageState.DONE)
    closed = close_job(dispatcher, job, own_ledger)

    assert lives > 2
    assert (closed.done, closed.cancelled_images, closed.window) == (10, 71, 0)
    assert not own_ledger.jobs.check(job.id, repair=False).counts
    assert_window_empty(own_ledger)


def find_disagreements(target: str, ledger: Ledger, store: Store) -> list[Disagreement]:
    found = audit(target, repair=False, deep=False, ledger=ledger, store=store, seen=lambda _: None)
    return [disagreement for disagreement in found if disagreement.code != "extra_object"]


def test_a_job_that_is_cancelled_while_it_is_listed_is_consistent_in_redis_and_s3(
    own_ledger: Ledger, dispatcher: Dispatcher, store: Store, places: Places
) -> None:
    request = Request(
        source=places.source_location,
        destination=places.destination,
        recipe=Recipe(),
        lane="backfill",
        name="",
        keys=tuple(f"{number:05d}.jpg" for number in range(2 * PART_ROWS)),
    )

    def cancel(_: int) -> None:
        assert own_ledger.jobs.cancel(own_ledger.jobs.newest()[0].id)
        dispatcher.step()

    with pytest.raises(JobError, match="cancelled while it was being listed"):
        submit(request, store=store, ledger=own_ledger, lease_s=LEASE_S, listed=cancel)
    (job,) = own_ledger.jobs.newest()
    with pytest.raises(JobError, match="submit its source again"):
        resume(job.id, request, store=store, ledger=own_ledger, listed=lambda _: None)
    closed = close_job(dispatcher, job, own_ledger)

    assert (closed.total, closed.cancelled_images) == (PART_ROWS, PART_ROWS)
    assert not find_disagreements(job.id, own_ledger, store)
    own_ledger.connection.call("flushdb")
    assert not find_disagreements(str(job.record_path("")), own_ledger, store), "the late part does not count"
