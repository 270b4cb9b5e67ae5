"""The live view of a job: `cutfleet status JOB --watch`."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from jobs.job import ImageState
from jobs.ledger import Ledger
from jobs.message import worker_queues
from jobs.s3.client import Store
from jobs.settings import Settings
from jobs.sliding_rate import SlidingRate
from producer.console.live_view import RATE_WINDOW_S, FailureCounts, render_view, watch_job
from producer.dispatcher.dispatcher import Dispatcher
from tests.support.places import Places
from tests.support.submissions import submit_keys
from tests.support.work import close_job, finish_all, step_until, work_off


@pytest.fixture
def dispatcher(own_ledger: Ledger, store: Store) -> Iterator[Dispatcher]:
    dispatcher = Dispatcher(own_ledger, store, Settings())
    yield dispatcher
    dispatcher.close()


@pytest.fixture
def console() -> Console:
    return Console(record=True, width=200, file=io.StringIO())


def test_the_view_shows_rate_time_left_queues_workers_failures_and_images_to_review(
    own_ledger: Ledger, store: Store, places: Places, dispatcher: Dispatcher, console: Console
) -> None:
    job = submit_keys(places, own_ledger, store, count=20)
    step_until(dispatcher, lambda: own_ledger.jobs.get(job.id).cursor == 20, what="all is fed")
    fields: dict[str, str | int | float] = {"slots": 4, "in_flight": 3, "images": 77, "rate": 9.5}
    own_ledger.fleet.heartbeat("gpu0@host", {"model": job.model} | fields, ttl_s=60)
    work_off(own_ledger, lambda key: ImageState.FAILED if key < "k00002" else ImageState.REVIEW)
    job = own_ledger.jobs.get(job.id)

    survey = own_ledger.window.survey(worker_queues(job.model))
    failures = FailureCounts().read(job, own_ledger)
    console.print(render_view(job, 4.0, survey, own_ledger.fleet.workers(), failures))

    shown = console.export_text()
    assert "rate:      4.0 a second, 0 s left" in shown
    assert f"20 on backfill.{job.model}; 0 leased by workers" in shown
    assert "failures:  2 damaged" in shown
    assert "18 to review" in shown
    assert [line.split() for line in shown.splitlines() if "gpu0@host" in line] == [["gpu0@host", "3", "77", "9.5"]]


def test_the_rate_ignores_what_is_older_than_its_window() -> None:
    rate = SlidingRate(RATE_WINDOW_S)
    rate.add(0, now=0)
    assert rate.per_second is None
    rate.add(50, now=10_000)
    assert rate.per_second is None, "the pause of a night does not count"

    rate.add(150, now=10_010)

    assert rate.per_second == 10


def test_the_view_ends_when_its_job_closes(
    own_ledger: Ledger, store: Store, places: Places, dispatcher: Dispatcher, console: Console
) -> None:
    job = submit_keys(places, own_ledger, store, count=3, lane="live")
    finish_all(job, own_ledger)
    close_job(dispatcher, job, own_ledger)

    assert watch_job(job.id, own_ledger, console=console).done == 3

    assert "closed" in console.export_text()
