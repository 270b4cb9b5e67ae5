"""The list of jobs in the ledger: complete, read in steps, and without forgotten jobs."""

from __future__ import annotations

import dataclasses

import pytest

from jobs.ledger import Ledger
from jobs.message import queue_name
from jobs.recipe import Recipe
from jobs.s3.client import Store
from jobs.settings import Settings
from producer.dispatcher.dispatcher import Dispatcher
from producer.submission.request import Request
from producer.submission.submit import draft_job
from tests.support.places import Places
from tests.support.submissions import submit_keys
from tests.support.work import close_job, finish_all, lead, step_until


def test_closing_a_job_removes_forgotten_jobs_from_the_list(own_ledger: Ledger, store: Store, places: Places) -> None:
    dispatcher = Dispatcher(own_ledger, store, Settings())

    def complete_job() -> str:
        job = submit_keys(places, own_ledger, store, count=1, lane="live")
        finish_all(job, own_ledger)
        return close_job(dispatcher, job, own_ledger).id

    first = complete_job()
    own_ledger.connection.call("delete", f"cf:job:{first}")  # it has expired
    assert first in own_ledger.connection.call("zrange", "cf:jobs", 0, -1)
    complete_job()
    dispatcher.close()

    assert first not in own_ledger.connection.call("zrange", "cf:jobs", 0, -1)


def test_old_jobs_that_never_close_keep_no_forgotten_job_in_the_list(
    own_ledger: Ledger, store: Store, places: Places
) -> None:
    request = Request(
        source=places.source_location,
        destination=places.destination,
        recipe=Recipe(),
        lane="backfill",
        name="",
        keys=None,
    )
    job = draft_job(request, job_id="open", store=store)
    epoch = lead(own_ledger)
    for number in range(20):
        own_ledger.jobs.create(dataclasses.replace(job, id=f"open-{number}"))

    for number in range(300):
        own_ledger.jobs.create(dataclasses.replace(job, id=f"short-{number}"))
        own_ledger.jobs.finish_listing(f"short-{number}")
        assert own_ledger.dispatch.close(epoch, f"short-{number}", keep_s=0), "it expires at once"

    assert own_ledger.connection.call("zcard", "cf:jobs") < 100
    assert len(own_ledger.jobs.newest(limit=100)) == 20, "jobs that still exist stay in the list"


def test_jobs_and_messages_are_complete_when_read_in_several_steps(
    own_ledger: Ledger, store: Store, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.ledger.jobs.JOBS_PER_CALL", 2)
    monkeypatch.setattr("jobs.ledger.window.MESSAGES_PER_CALL", 3)
    jobs = [submit_keys(places, own_ledger, store, count=2).id for _ in range(5)]
    dispatcher = Dispatcher(own_ledger, store, Settings())
    step_until(dispatcher, lambda: all(job.cursor == 2 for job in own_ledger.jobs.open()), what="all is fed")
    dispatcher.close()

    assert [job.id for job in own_ledger.jobs.newest()] == jobs[::-1]
    assert [job.id for job in own_ledger.jobs.newest(limit=5)] == jobs[::-1]
    assert [job.id for job in own_ledger.jobs.newest(limit=3)] == jobs[:1:-1]
    assert [job.id for job in own_ledger.jobs.open()] == sorted(jobs)
    queue = queue_name("backfill", Recipe().model)
    assert own_ledger.window.images_with_message([queue]) == {f"{job}:{index}" for job in jobs for index in (0, 1)}


def test_jobs_that_are_forgotten_during_the_read_hide_no_other(
    own_ledger: Ledger, store: Store, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.ledger.jobs.JOBS_PER_CALL", 2)
    jobs = [submit_keys(places, own_ledger, store, count=1).id for _ in range(6)]
    newest = own_ledger.jobs.all()

    first = next(newest).id
    own_ledger.connection.call("zrem", "cf:jobs", first)

    assert {first, *(job.id for job in newest)} == set(jobs)
