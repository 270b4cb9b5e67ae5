"""Images that fail: replayed by a person, too many of them, and more of them than Redis holds."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from jobs.envelope import parse_message
from jobs.job import ImageState, Job
from jobs.ledger import Ledger
from jobs.s3.client import Store
from jobs.settings import Settings
from producer.demo.local_stack import LocalStack
from producer.dispatcher.dispatcher import Dispatcher
from producer.records import failures
from tests.support.environment import Run, own_redis_url
from tests.support.places import Places, fetch_output
from tests.support.submissions import submit_keys
from tests.support.work import assert_window_empty, close_job, work_off


@pytest.fixture
def dispatcher(own_ledger: Ledger, store: Store) -> Iterator[Dispatcher]:
    dispatcher = Dispatcher(own_ledger, store, Settings())
    yield dispatcher
    dispatcher.close()


def read_report_file(job: Job, name: str, store: Store) -> str:
    return fetch_output(store, job.record_path(f"report/{name}")).decode()


def test_a_replay_reopens_failures_of_one_code_and_the_job_closes_again(
    own_ledger: Ledger, store: Store, places: Places, dispatcher: Dispatcher
) -> None:
    job = submit_keys(places, own_ledger, store, count=6)
    dispatcher.step()
    work_off(own_ledger, lambda key: ImageState.FAILED if key < "k00004" else ImageState.REVIEW)
    closed = close_job(dispatcher, job, own_ledger)
    assert (closed.failed, closed.done) == (4, 2)
    assert len(read_report_file(job, "dead-000000.jsonl", store).splitlines()) == 4

    assert failures.replay(closed, "truncated", ledger=own_ledger, store=store) == 0
    assert failures.replay(closed, "damaged", ledger=own_ledger, store=store) == 4
    assert failures.replay(closed, "damaged", ledger=own_ledger, store=store) == 0
    reopened = own_ledger.jobs.get(job.id)
    assert (reopened.closed, reopened.failed, reopened.open, reopened.reopened) == (None, 0, 4, 4)
    assert (reopened.acknowledged_final, reopened.acknowledged_failed) == (2, 0), "only new failures pause the job"
    dispatcher.step()
    tasks = [parse_message(message) for _, message in own_ledger.window.entries()]
    assert {(task.key, task.etag) for task in tasks} == {(f"k0000{number}.jpg", "") for number in range(4)}
    work_off(own_ledger, lambda key: ImageState.FAILED if key == "k00000.jpg" else ImageState.DONE)
    closed = close_job(dispatcher, job, own_ledger)

    assert (closed.failed, closed.done, closed.open, closed.reopened, closed.window) == (1, 5, 0, 0, 0)
    assert json.loads(read_report_file(job, "summary.json", store))["failed"] == 1
    assert len(read_report_file(job, "dead-000000.jsonl", store).splitlines()) == 1
    assert_window_empty(own_ledger)
    assert own_ledger.connection.call("ttl", f"cf:job:{job.id}") > 0


def test_a_job_that_mostly_fails_is_paused_until_a_person_unpauses_it(
    own_ledger: Ledger, store: Store, places: Places, dispatcher: Dispatcher
) -> None:
    job = submit_keys(places, own_ledger, store, count=330)

    def turn(state: ImageState) -> Job:
        dispatcher.step()
        work_off(own_ledger, lambda _: state)
        return own_ledger.jobs.get(job.id)

    while (paused := turn(ImageState.FAILED)).paused is None:
        pass
    assert paused.final < 200
    assert "too_many_failures" in str(paused.paused)
    for _ in range(3):
        turn(ImageState.FAILED)
    assert own_ledger.jobs.get(job.id).cursor == paused.cursor, "nothing more is fed"

    assert own_ledger.jobs.unpause(job.id)
    assert not own_ledger.jobs.unpause(job.id)
    while turn(ImageState.DONE).open:
        pass

    assert own_ledger.jobs.get(job.id).paused is None


def test_failures_beyond_the_limit_of_redis_move_to_s3_and_are_still_found(
    stack: LocalStack,
    cutfleet: Run,
    own_ledger: Ledger,
    store: Store,
    places: Places,
    dispatcher: Dispatcher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(failures, "MAX_HELD", 10)
    monkeypatch.setattr("producer.dispatcher.dispatcher.MAX_HELD", 10)
    monkeypatch.setattr(failures, "SPILL_ROWS", 8)
    job = submit_keys(places, own_ledger, store, count=40)
    dispatcher.step()
    work_off(own_ledger, lambda _: ImageState.FAILED)
    before = own_ledger.jobs.get(job.id)
    while dispatcher.step():
        pass

    spilled = own_ledger.jobs.get(job.id)
    assert sorted(dict(failures.all_failures(before, ledger=own_ledger, store=store))) == list(range(40))
    assert spilled.spills >= 2
    assert own_ledger.images.count_failures(job.id) == 40 - 8 * spilled.spills
    found = dict(failures.all_failures(spilled, ledger=own_ledger, store=store))
    assert sorted(found) == list(range(40))
    assert found[3].key == "k00003.jpg"
    shown = cutfleet("status", job.id, "--failed", env={"CUTFLEET_REDIS_URL": own_redis_url(stack)}).stdout
    assert [line.split("\t")[0] for line in shown.splitlines()] == [f"k{number:05d}.jpg" for number in range(40)]
    assert failures.replay(spilled, None, ledger=own_ledger, store=store) == 40
    dispatcher.step()
    work_off(own_ledger, lambda key: ImageState.FAILED if key == "k00003.jpg" else ImageState.DONE)
    closed = close_job(dispatcher, job, own_ledger)
    assert [index for index, _ in failures.all_failures(closed, ledger=own_ledger, store=store)] == [3]
