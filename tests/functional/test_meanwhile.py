"""Something else goes on between two steps, in the order that harms."""

from __future__ import annotations

from typing import Any

import pytest

import producer.dispatcher.dispatcher
from jobs.errors import OutputError
from jobs.job import Job
from jobs.ledger import Ledger
from jobs.recipe import Recipe
from jobs.s3.client import Store, record_location
from jobs.settings import Settings
from producer.api import service as requests
from producer.dispatcher.dispatcher import Dispatcher
from producer.records.job_record import read_record
from producer.records.manifest import find_rows, read_part, record_live
from producer.submission.submit import Request
from tests.support.factories import Places, make, wait_until


def test_a_row_that_is_moved_to_s3_meanwhile_is_found_and_one_that_is_lost_is_named(
    alone: Ledger, store: Store, places: Places
) -> None:
    before = make(places, alone, store, count=3, lane="live")
    lost = make(places, alone, store, count=1, lane="live")
    epoch = alone.lead("first", ttl_s=60)
    assert epoch is not None

    def look(job: Job, index: int) -> str:
        (task,) = find_rows(job, index, 1, part=lambda number: read_part(store, job, number), ledger=alone)
        return task.key

    keys = [look(before, index) for index in range(3)]
    assert record_live(before, epoch=epoch, store=store, ledger=alone)
    alone._call("delete", f"cf:job:{lost.id}:rows")

    assert [look(before, index) for index in range(3)] == keys == ["k00000.jpg", "k00001.jpg", "k00002.jpg"]
    with pytest.raises(OutputError, match="do not fit its manifest"):
        look(lost, 0)


def test_a_machine_that_stood_still_within_a_turn_lets_workers_renew_first(
    alone: Ledger, store: Store, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make(places, alone, store, count=1, lane="live")
    claim = alone.claim(f"{job.id}:0", token="t", output="o", lease_s=0.01)
    claimed = alone.time_s()
    wait_until(lambda: alone.time_s() > claimed + 0.1, what="its lease is over")
    now, open_jobs = [1000.0], alone.open_jobs

    def late() -> list[Job]:
        now[0] += 40
        return open_jobs()

    monkeypatch.setattr(producer.dispatcher.dispatcher, "_clock", lambda: now[0])
    monkeypatch.setattr(alone, "uptime_s", lambda: 1e6)
    dispatcher = Dispatcher(alone, store, Settings(lease_s=60))
    monkeypatch.setattr(alone, "open_jobs", late)
    dispatcher.step()
    monkeypatch.setattr(alone, "open_jobs", open_jobs)
    dispatcher.step()
    assert alone.place(claim.image) == "leased"
    now[0] += 61
    dispatcher.step()
    dispatcher.close()

    assert alone.place(claim.image) != "leased"


def test_jobs_that_are_forgotten_while_all_are_read_hide_no_other(
    alone: Ledger, store: Store, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.ledger.JOBS_AT_ONCE", 2)
    made = [make(places, alone, store, count=1).id for _ in range(6)]
    newest = alone.all_jobs()

    first = next(newest).id
    alone._redis.zrem("cf:jobs", first, "nobody")

    assert {first, *(job.id for job in newest)} == set(made)


def test_a_request_that_is_sent_twice_at_once_is_recorded_as_the_ledger_has_it(
    alone: Ledger, store: Store, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone.heartbeat("w", {"model": "u2netp", "slots": 1}, ttl_s=60)
    request = Request(source=places.source, destination=places.to, recipe=Recipe(), lane="live", name="", keys=None)
    job_id, real = "20260101-000000-api-twice", requests.draft
    store.put(places.key("a.jpg"), b"1", content_type="image/jpeg")

    def draft_late(*args: Any, **options: Any) -> Job:
        monkeypatch.setattr(requests, "draft", real)
        store.put(places.key("b.jpg"), b"2", content_type="image/jpeg")
        requests.submit(request, job_id, store=store, ledger=alone, lease_s=60)
        return real(*args, **options)

    monkeypatch.setattr(requests, "draft", draft_late)
    job = requests.submit(request, job_id, store=store, ledger=alone, lease_s=60)

    rows = read_record(record_location(job.destination, job.id, ""), store).rows
    assert (job.total, [row.key for row in rows]) == (2, ["a.jpg", "b.jpg"])
