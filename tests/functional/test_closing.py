"""A job's end: its report, and what comes in between while it is written."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from typing import Any

import pytest

import producer.dispatcher.dispatcher
from jobs.broker import task_of
from jobs.errors import ServiceUnavailable
from jobs.job import Failure, ImageState, Job, ManifestPart
from jobs.ledger import Ledger
from jobs.ledger.connection import Fenced
from jobs.recipe import Recipe
from jobs.s3.client import Location, S3Object, Store, image_names, record_location, source_digest
from jobs.settings import Settings
from producer.audit.auditor import audit
from producer.dispatcher.dispatcher import Dispatcher
from producer.records import failures as dead
from producer.records.manifest import read_part
from producer.records.report import image_status, read_report, write_report
from producer.submission.submit import Request, draft, live_row
from tests.support.factories import Places, make, wait_until


def finish_all(job: Job, ledger: Ledger) -> None:
    for index in range(job.total):
        claim = ledger.claim(f"{job.id}:{index}", token=uuid.uuid4().hex, output=f"{job.id}/{index}", lease_s=60)
        assert ledger.finish(claim, ImageState.DONE) == "ok"


def is_closed(job: Job, ledger: Ledger) -> bool:
    return ledger.job(job.id).closed is not None


def test_a_dispatcher_that_lost_its_lock_writes_no_further_file_of_a_report(
    alone: Ledger, store: Store, places: Places
) -> None:
    job = make(places, alone, store, count=1)
    epoch = alone.lead("first", ttl_s=60)
    assert epoch is not None
    looks = 0

    def check() -> None:
        nonlocal looks
        looks += 1
        if looks == 2:
            alone.resign("first")
            assert alone.lead("second", ttl_s=60) == epoch + 1
        alone.check_leads(epoch)

    with pytest.raises(Fenced):
        write_report(alone.job(job.id), Settings(), ledger=alone, store=store, check=check)

    assert written(job, store) == {"succeeded-000000.csv"}


def written(job: Job, store: Store) -> set[str]:
    folder = record_location(job.destination, job.id, "report/")
    return {found.key.removeprefix(folder.key) for found in store.list_source(folder)}


def test_a_small_report_does_not_wait_for_a_large_one(
    alone: Ledger, store: Store, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(producer.dispatcher.dispatcher, "SMALL_JOB", 2)
    goes_on, small, large = threading.Event(), *(make(places, alone, store, count=count) for count in (2, 3))

    def slowly(job: Job, *args: Any, **options: Any) -> None:
        assert job.id == small.id or goes_on.wait(60)
        write_report(job, *args, **options)

    monkeypatch.setattr(producer.dispatcher.dispatcher, "write_report", slowly)
    dispatcher = Dispatcher(alone, store, Settings())
    wait_until(lambda: dispatcher.step() or all(alone.job(job.id).cursor for job in (small, large)), what="all is fed")
    finish_all(large, alone)
    dispatcher.step()  # begins with the large one's
    finish_all(small, alone)
    try:
        wait_until(lambda: dispatcher.step() or is_closed(small, alone), what="the small one is closed")
        assert not is_closed(large, alone)
    finally:
        goes_on.set()
    wait_until(lambda: dispatcher.step() or is_closed(large, alone), what="the large one is closed")
    dispatcher.close()


def test_rows_of_a_live_job_are_recorded_once_though_the_answer_was_lost(
    alone: Ledger, store: Store, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make(places, alone, store, count=3, lane="live")
    finish_all(job, alone)
    record = alone.record_part

    def twice(epoch: int, job: str, part: ManifestPart) -> bool:
        """What a client does whose connection broke behind its request."""
        assert record(epoch, job, part)
        return record(epoch, job, part)

    monkeypatch.setattr(alone, "record_part", twice)
    dispatcher = Dispatcher(alone, store, Settings())
    wait_until(lambda: dispatcher.step() or is_closed(job, alone), what="the job is closed")
    dispatcher.close()

    job = alone.job(job.id)
    assert (job.parts, job.unrecorded, job.total, job.done) == (1, 0, 3, 3)
    assert [task.key for task in read_part(store, job, 0)] == [f"k{index:05d}.jpg" for index in range(3)]
    assert "summary.json" in written(job, store)


class Asleep(Store):
    """Sleeps before its next put, while something else goes on."""

    def __init__(self, store: Store, meanwhile: Callable[[], object]) -> None:
        self.__dict__.update(store.__dict__)
        self.meanwhile: Callable[[], object] | None = meanwhile

    def put(self, location: Location, body: bytes, **more: Any) -> str:
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return super().put(location, body, **more)


def fail_all(job: Job, ledger: Ledger) -> None:
    tasks = [task_of(message) for _, message in ledger.entries()]
    keys = {task.index: task.key for task in tasks}
    for index in range(job.total):
        claim = ledger.claim(f"{job.id}:{index}", token=uuid.uuid4().hex, output=f"{job.id}/{index}", lease_s=60)
        assert ledger.finish(claim, ImageState.FAILED, Failure(keys[index], "damaged", "why", 1, 1.0, "w")) == "ok"


def next_epoch(ledger: Ledger, before: str, me: str) -> int:
    ledger.resign(before)
    epoch = ledger.lead(me, ttl_s=60)
    assert epoch is not None
    return epoch


def test_a_dispatcher_that_slept_over_its_lock_replaces_no_failures_of_the_next(
    alone: Ledger, store: Store, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead, "MAX_HELD", 4)
    monkeypatch.setattr(dead, "SPILL_ROWS", 3)
    job = make(places, alone, store, count=12)
    dispatcher = Dispatcher(alone, store, Settings())
    wait_until(lambda: dispatcher.step() or alone.job(job.id).cursor == 12, what="all is fed")
    dispatcher.close()
    fail_all(job, alone)
    epoch = next_epoch(alone, "", "first")

    def go_on() -> None:
        second = next_epoch(alone, "first", "second")
        monkeypatch.setattr(dead, "SPILL_ROWS", 5)
        assert dead.spill(second, alone.job(job.id), ledger=alone, store=store)

    with pytest.raises(Fenced):
        dead.spill(epoch, alone.job(job.id), ledger=alone, store=Asleep(store, go_on))

    known = dict(dead.failures_of(alone.job(job.id), ledger=alone, store=store))
    assert sorted(known) == list(range(12))


def test_a_dispatcher_that_slept_over_its_lock_replaces_no_report_of_the_next(
    alone: Ledger, store: Store, places: Places
) -> None:
    job = make(places, alone, store, count=2)
    epoch = next_epoch(alone, "", "first")

    def go_on() -> None:
        second = next_epoch(alone, "first", "second")
        alone.cancel(job.id)
        alone.cancel_rest(second, job.id, 0, ())
        write_report(alone.job(job.id), Settings(), ledger=alone, store=store)

    with pytest.raises(Fenced):
        asleep = Asleep(store, go_on)
        write_report(alone.job(job.id), Settings(), ledger=alone, store=asleep, check=lambda: alone.check_leads(epoch))

    states, _ = read_report(alone.job(job.id), read_part(store, job, 0), store=store)
    assert states == [ImageState.CANCELLED] * 2


def test_what_failed_once_and_is_done_is_done_in_the_last_report(alone: Ledger, store: Store, places: Places) -> None:
    """Keys that some would call two lines."""
    keys = ("a\u2028b.jpg", "c\x85d.jpg")
    job = make(places, alone, store, keys=keys)
    dispatcher = Dispatcher(alone, store, Settings())
    wait_until(lambda: dispatcher.step() or alone.job(job.id).cursor == 2, what="all is fed")
    fail_all(job, alone)
    wait_until(lambda: dispatcher.step() or is_closed(job, alone), what="it is closed")
    tasks = read_part(store, job, 0)
    states, failures = read_report(job, tasks, store=store)
    assert (states, sorted(failures)) == ([ImageState.FAILED] * 2, [0, 1])

    assert dead.retry(alone.job(job.id), None, ledger=alone, store=store) == 2
    wait_until(lambda: dispatcher.step() or alone.job(job.id).window == 2, what="they are fed again")
    finish_all(job, alone)
    wait_until(lambda: dispatcher.step() or is_closed(job, alone), what="it is closed")

    assert read_report(job, tasks, store=store) == ([ImageState.DONE] * 2, {})
    dispatcher.close()


def test_a_job_that_redis_forgot_is_well_though_it_has_a_key_twice(alone: Ledger, store: Store, places: Places) -> None:
    """As a watch lists a key again for each of its versions: the report has one line of each, and no index."""
    day = draft(requested(places), job_id="20260101-000000-twice", watch="twice", store=store)
    rows = [(f"dddddddd{index}", "", "e", *live_row(index, S3Object("a.jpg", "e", 1), day)) for index in range(2)]
    assert alone.append_live(day, rows, lease_s=60) == "ok"
    alone.finish_listing(day.id)
    names = image_names(places.source, places.to, "a.jpg")
    told = {"cf-job": day.id, "cf-source": source_digest(names.source), "cf-source-etag": "e"}
    told["cf-mask-etag"] = store.put(names.mask, b"mask", content_type="image/png")
    store.put(names.cutout, b"cutout", content_type="image/png", metadata=told)
    for index, state in enumerate((ImageState.FAILED, ImageState.DONE)):
        claim = alone.claim(f"{day.id}:{index}", token="t", output=str(names.cutout), lease_s=60)
        alone.finish(claim, state, Failure("a.jpg", "not_an_image", "", 1, 0.0, "w") if not index else None)
    dispatcher = Dispatcher(alone, store, Settings())
    wait_until(lambda: dispatcher.step() or is_closed(day, alone), what="the job is closed")
    dispatcher.close()
    alone._call("flushdb")

    folder = str(record_location(day.destination, day.id, ""))
    found = list(audit(folder, repair=True, deep=False, ledger=alone, store=store, seen=lambda _: None))

    assert found == []
    assert alone.restore(day.id, {0: ImageState.DONE}) == 0
    assert alone._redis.keys("cf:job:*") == []


def requested(places: Places) -> Request:
    return Request(source=places.source, destination=places.to, recipe=Recipe(), lane="live", name="", keys=None)


def test_an_image_whose_cutout_has_too_long_a_name_has_the_state_that_it_has(
    alone: Ledger, store: Store, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, head = "k" * 1020, store.head

    def strict(place: Location, **more: Any) -> S3Object | None:
        """As AWS answers: with 400, and without a word of why."""
        if len(place.key) > 1024:
            raise ServiceUnavailable("S3 answered 400.", code="store_failed")
        return head(place, **more)

    job = make(places, alone, store, keys=(key,), lane="live")
    claim = alone.claim(f"{job.id}:0", token="t", output="o", lease_s=60)
    alone.finish(claim, ImageState.FAILED, Failure(key, "name_too_long", "too long", 1, 0.0, "w"))
    monkeypatch.setattr(store, "head", strict)

    told = image_status(places.key(key), ledger=alone, store=store)

    assert (told.state, told.code) == ("failed", "name_too_long")
