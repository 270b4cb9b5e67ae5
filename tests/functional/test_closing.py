"""The end of a job: its report, and what happens while the report is written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import producer.dispatcher.closing
from jobs.errors import ServiceUnavailable
from jobs.job import ImageState, Job, ManifestPart
from jobs.ledger import Ledger
from jobs.ledger.connection import Fenced
from jobs.ledger.watches import Appended
from jobs.recipe import Recipe
from jobs.s3.client import S3Object, Store
from jobs.s3.location import Location
from jobs.s3.names import source_digest
from jobs.settings import Settings
from producer.audit.auditor import audit
from producer.dispatcher.dispatcher import Dispatcher
from producer.records import failures
from producer.records.image_status import find_image_status
from producer.records.manifest import live_row, read_part
from producer.records.report import read_report, write_report
from producer.submission.request import Request
from producer.submission.submit import draft_job
from tests.support.places import Places
from tests.support.submissions import submit_keys
from tests.support.work import close_job, finish_all, finish_image, is_closed, lead, step_until


@pytest.fixture
def dispatcher(own_ledger: Ledger, store: Store) -> Iterator[Dispatcher]:
    dispatcher = Dispatcher(own_ledger, store, Settings())
    yield dispatcher
    dispatcher.close()


class PutInterrupted(Store):
    """A store during whose next `put` something else happens, as to a process that is frozen there."""

    def __init__(self, store: Store, meanwhile: Callable[[], object]) -> None:
        self.__dict__.update(store.__dict__)
        self.meanwhile: Callable[[], object] | None = meanwhile

    def put(self, location: Location, body: bytes, **options: Any) -> str:
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return super().put(location, body, **options)


def report_files(job: Job, store: Store) -> set[str]:
    folder = job.record_path("report/")
    return {found.key.removeprefix(folder.key) for found in store.list_source(folder)}


def test_a_dispatcher_that_loses_its_lock_writes_no_further_file_of_a_report(
    own_ledger: Ledger, store: Store, places: Places
) -> None:
    job = submit_keys(places, own_ledger, store, count=1)
    epoch = lead(own_ledger, "first")
    checks = 0

    def check() -> None:
        nonlocal checks
        checks += 1
        if checks == 2:
            assert lead(own_ledger, "second", instead_of="first") == epoch + 1
        own_ledger.dispatch.check_lock(epoch)

    with pytest.raises(Fenced):
        write_report(own_ledger.jobs.get(job.id), Settings(), ledger=own_ledger, store=store, check=check)

    assert report_files(job, store) == {"succeeded-000000.csv"}


def test_a_small_report_does_not_wait_for_a_large_one(
    own_ledger: Ledger, store: Store, places: Places, dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(producer.dispatcher.closing, "SMALL_JOB", 2)
    may_end = threading.Event()
    small, large = (submit_keys(places, own_ledger, store, count=count) for count in (2, 3))

    def write_slowly(job: Job, *args: Any, **options: Any) -> None:
        assert job.id == small.id or may_end.wait(60)
        write_report(job, *args, **options)

    monkeypatch.setattr(producer.dispatcher.closing, "write_report", write_slowly)
    jobs = (small, large)
    step_until(dispatcher, lambda: all(own_ledger.jobs.get(job.id).cursor for job in jobs), what="both are fed")
    finish_all(large, own_ledger)
    dispatcher.step()  # starts the report of the large job
    finish_all(small, own_ledger)
    try:
        close_job(dispatcher, small, own_ledger)
        assert not is_closed(large, own_ledger)
    finally:
        may_end.set()
    close_job(dispatcher, large, own_ledger)


def test_rows_of_a_live_job_are_recorded_once_though_the_request_was_sent_twice(
    own_ledger: Ledger, store: Store, places: Places, dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit_keys(places, own_ledger, store, count=3, lane="live")
    finish_all(job, own_ledger)
    record_part = own_ledger.dispatch.record_part

    def record_twice(epoch: int, job_id: str, part: ManifestPart) -> bool:
        """A client repeats a request when the connection broke before the answer."""
        assert record_part(epoch, job_id, part)
        return record_part(epoch, job_id, part)

    monkeypatch.setattr(own_ledger.dispatch, "record_part", record_twice)
    job = close_job(dispatcher, job, own_ledger)

    assert (job.parts, job.unrecorded, job.total, job.done) == (1, 0, 3, 3)
    assert [task.key for task in read_part(store, job, 0)] == [f"k{index:05d}.jpg" for index in range(3)]
    assert "summary.json" in report_files(job, store)


def test_a_dispatcher_that_wakes_without_its_lock_replaces_no_failures_of_the_next(
    own_ledger: Ledger, store: Store, places: Places, dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "MAX_HELD", 4)
    monkeypatch.setattr(failures, "SPILL_ROWS", 3)
    job = submit_keys(places, own_ledger, store, count=12)
    step_until(dispatcher, lambda: own_ledger.jobs.get(job.id).cursor == 12, what="all is fed")
    dispatcher.close()
    finish_all(job, own_ledger, ImageState.FAILED)
    epoch = lead(own_ledger, "first")

    def spill_by_the_next() -> None:
        second = lead(own_ledger, "second", instead_of="first")
        monkeypatch.setattr(failures, "SPILL_ROWS", 5)
        assert failures.spill(second, own_ledger.jobs.get(job.id), ledger=own_ledger, store=store)

    with pytest.raises(Fenced):
        interrupted = PutInterrupted(store, spill_by_the_next)
        failures.spill(epoch, own_ledger.jobs.get(job.id), ledger=own_ledger, store=interrupted)

    found = dict(failures.all_failures(own_ledger.jobs.get(job.id), ledger=own_ledger, store=store))
    assert sorted(found) == list(range(12))


def test_a_dispatcher_that_wakes_without_its_lock_replaces_no_report_of_the_next(
    own_ledger: Ledger, store: Store, places: Places
) -> None:
    job = submit_keys(places, own_ledger, store, count=2)
    epoch = lead(own_ledger, "first")

    def report_by_the_next() -> None:
        second = lead(own_ledger, "second", instead_of="first")
        own_ledger.jobs.cancel(job.id)
        own_ledger.dispatch.cancel_next(second, job.id, 0, ())
        write_report(own_ledger.jobs.get(job.id), Settings(), ledger=own_ledger, store=store)

    with pytest.raises(Fenced):
        write_report(
            own_ledger.jobs.get(job.id),
            Settings(),
            ledger=own_ledger,
            store=PutInterrupted(store, report_by_the_next),
            check=lambda: own_ledger.dispatch.check_lock(epoch),
        )

    states, _ = read_report(own_ledger.jobs.get(job.id), read_part(store, job, 0), store=store)
    assert states == [ImageState.CANCELLED] * 2


def test_images_that_failed_and_are_done_after_a_retry_are_done_in_the_last_report(
    own_ledger: Ledger, store: Store, places: Places, dispatcher: Dispatcher
) -> None:
    """The keys contain characters that `str.splitlines` takes for line ends."""
    keys = ("a\u2028b.jpg", "c\x85d.jpg")
    job = submit_keys(places, own_ledger, store, keys=keys)
    step_until(dispatcher, lambda: own_ledger.jobs.get(job.id).cursor == 2, what="all is fed")
    finish_all(job, own_ledger, ImageState.FAILED)
    job = close_job(dispatcher, job, own_ledger)
    tasks = read_part(store, job, 0)
    states, found = read_report(job, tasks, store=store)
    assert (states, sorted(found)) == ([ImageState.FAILED] * 2, [0, 1])

    assert failures.replay(job, None, ledger=own_ledger, store=store) == 2
    step_until(dispatcher, lambda: own_ledger.jobs.get(job.id).window == 2, what="both are fed again")
    finish_all(job, own_ledger)
    close_job(dispatcher, job, own_ledger)

    assert read_report(job, tasks, store=store) == ([ImageState.DONE] * 2, {})


def test_audit_finds_nothing_wrong_with_a_forgotten_job_that_has_a_key_twice(
    own_ledger: Ledger, store: Store, places: Places, dispatcher: Dispatcher
) -> None:
    """A watch lists a key again for each version of its object: the report has one line each, without index."""
    request = Request(
        source=places.source_location, destination=places.destination, recipe=Recipe(), lane="live", name="", keys=None
    )
    job = draft_job(request, job_id="20260101-000000-twice", watch="twice", store=store)
    rows = [(f"dddddddd{index}", "", "e", *live_row(index, S3Object("a.jpg", "e", 1), job)) for index in range(2)]
    assert own_ledger.watches.append_images(job, rows, lease_s=60) is Appended.OK
    own_ledger.jobs.finish_listing(job.id)
    paths = job.paths("a.jpg")
    metadata = {"cf-job": job.id, "cf-source": source_digest(paths.source), "cf-source-etag": "e"}
    metadata["cf-mask-etag"] = store.put(paths.mask, b"mask", content_type="image/png")
    store.put(paths.cutout, b"cutout", content_type="image/png", metadata=metadata)
    finish_image(job, 0, own_ledger, ImageState.FAILED, key="a.jpg")
    finish_image(job, 1, own_ledger)
    close_job(dispatcher, job, own_ledger)
    dispatcher.close()
    own_ledger.connection.call("flushdb")

    folder = str(job.record_path(""))
    found = list(audit(folder, repair=True, deep=False, ledger=own_ledger, store=store, seen=lambda _: None))

    assert found == []
    assert own_ledger.images.restore(job.id, {0: ImageState.DONE}) == 0
    assert own_ledger.connection.call("keys", "cf:job:*") == []


def test_the_status_of_an_image_whose_cutout_has_too_long_a_name_is_its_failure(
    own_ledger: Ledger, store: Store, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, head = "k" * 1020, store.head

    def head_as_aws(location: Location, **options: Any) -> S3Object | None:
        """AWS answers 400 without a reason."""
        if len(location.key) > 1024:
            raise ServiceUnavailable("S3 answered 400.", code="store_failed")
        return head(location, **options)

    job = submit_keys(places, own_ledger, store, keys=(key,), lane="live")
    finish_image(job, 0, own_ledger, ImageState.FAILED, key=key, code="name_too_long")
    monkeypatch.setattr(store, "head", head_as_aws)

    status = find_image_status(places.key(key), ledger=own_ledger, store=store)

    assert (status.state, status.code) == ("failed", "name_too_long")
