"""Two things happen at the same time, in the order that does most harm."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.errors import OutputError
from jobs.job import Job
from jobs.ledger import Ledger
from jobs.ledger.window import Place
from jobs.recipe import Recipe
from jobs.s3.client import Store
from jobs.settings import Settings
from producer.api import service
from producer.dispatcher.dispatcher import Dispatcher
from producer.records.job_record import read_record
from producer.records.manifest import ManifestReader, record_live
from producer.submission.request import Request
from producer.submission.submit import draft_job
from tests.support.places import Places
from tests.support.submissions import submit_keys
from tests.support.waiting import wait_until
from tests.support.work import lead


def test_rows_that_move_to_s3_are_found_and_lost_rows_are_an_error(
    own_ledger: Ledger, store: Store, places: Places
) -> None:
    job = submit_keys(places, own_ledger, store, count=3, lane="live")
    lost = submit_keys(places, own_ledger, store, count=1, lane="live")
    reader = ManifestReader(job, store, own_ledger)
    epoch = lead(own_ledger)

    before = [task.key for index in range(3) for task in reader.find(index)]
    assert record_live(job, epoch=epoch, store=store, ledger=own_ledger)
    own_ledger.connection.call("delete", f"cf:job:{lost.id}:rows")

    after = [task.key for index in range(3) for task in reader.find(index)]
    assert after == before == ["k00000.jpg", "k00001.jpg", "k00002.jpg"]
    with pytest.raises(OutputError) as caught:
        ManifestReader(lost, store, own_ledger).find(0)
    assert caught.value.code == "manifest_damaged"


def test_after_the_machine_was_suspended_within_a_turn_workers_get_one_lease_to_renew(
    own_ledger: Ledger, store: Store, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit_keys(places, own_ledger, store, count=1, lane="live")
    claim = own_ledger.window.claim(f"{job.id}:0", token="t", output="o", lease_s=0.01)
    claimed = own_ledger.server_time_s()
    wait_until(lambda: own_ledger.server_time_s() > claimed + 0.1, what="the lease has expired")
    now, open_jobs = 1000.0, own_ledger.jobs.open

    def suspended_open() -> list[Job]:
        nonlocal now
        now += 40
        return open_jobs()

    monkeypatch.setattr(own_ledger, "uptime_s", lambda: 1e6)
    dispatcher = Dispatcher(own_ledger, store, Settings(lease_s=60), clock=lambda: now)
    monkeypatch.setattr(own_ledger.jobs, "open", suspended_open)
    dispatcher.step()
    monkeypatch.setattr(own_ledger.jobs, "open", open_jobs)
    dispatcher.step()
    assert own_ledger.window.place(claim.image) is Place.LEASED
    now += 61
    dispatcher.step()
    dispatcher.close()

    assert own_ledger.window.place(claim.image) is Place.WAITING


def test_an_api_request_that_is_sent_twice_at_once_is_recorded_as_the_ledger_has_it(
    own_ledger: Ledger, store: Store, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_ledger.fleet.heartbeat("w", {"model": "u2netp", "slots": 1}, ttl_s=60)
    request = Request(
        source=places.source_location, destination=places.destination, recipe=Recipe(), lane="live", name="", keys=None
    )
    job_id = "20260101-000000-api-twice"
    store.put(places.key("a.jpg"), b"1", content_type="image/jpeg")

    def draft_after_the_second(*args: Any, **options: Any) -> Job:
        monkeypatch.setattr("producer.api.service.draft_job", draft_job)
        store.put(places.key("b.jpg"), b"2", content_type="image/jpeg")
        service.submit(request, job_id, store=store, ledger=own_ledger, lease_s=60)
        return draft_job(*args, **options)

    monkeypatch.setattr("producer.api.service.draft_job", draft_after_the_second)
    job = service.submit(request, job_id, store=store, ledger=own_ledger, lease_s=60)

    rows = read_record(job.record_path(""), store).rows
    assert (job.total, [row.key for row in rows]) == (2, ["a.jpg", "b.jpg"])
