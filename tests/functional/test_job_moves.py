"""What a person can do to a job: cancel it, pause it, try its failures again; and what the dispatcher does by itself.
The test claims and finishes images itself, through the ledger; dispatcher, ledger and store are the real ones."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable, Iterator

import pytest
from rich.console import Console

from jobs.broker import lane_queue, task_of, worker_queues
from jobs.errors import JobError
from jobs.job import Failure, ImageState, Job, ManifestPart
from jobs.ledger import Ledger
from jobs.ledger.connection import Fenced
from jobs.recipe import Recipe
from jobs.s3.client import Location, S3Object, Store
from jobs.settings import Settings
from producer.audit.auditor import Disagreement, audit
from producer.console.live_view import Codes, Pace, screen, watch_job
from producer.console.output import job_lines
from producer.demo.local_stack import LocalStack
from producer.dispatcher.dispatcher import Dispatcher
from producer.records import failures as dead
from producer.records.manifest import PART_ROWS, write_part
from producer.submission import submit as submission
from tests.support.environment import Run
from tests.support.factories import Places, fetch, put_images, wait_until

LEASE_S = 60.0


@pytest.fixture
def ledger(stack: LocalStack) -> Iterator[Ledger]:
    """A database of its own, where no other dispatcher is."""
    with Ledger(stack.environment["CUTFLEET_REDIS_URL"].replace("/0", "/7"), name="here") as ledger:
        ledger._redis.flushdb()
        yield ledger


@pytest.fixture
def dispatcher(ledger: Ledger, store: Store) -> Iterator[Dispatcher]:
    dispatcher = Dispatcher(ledger, store, Settings(lease_s=LEASE_S))
    dispatcher.step()  # takes the lock
    dispatcher._quiet_until = 0
    yield dispatcher
    dispatcher.close()


MakeJob = Callable[[int], Job]


@pytest.fixture
def make_job(store: Store, ledger: Ledger, places: Places) -> MakeJob:
    def make(count: int) -> Job:
        put_images(store, places, count)
        request = submission.Request(
            source=places.source, destination=places.to, recipe=Recipe(), lane="backfill", name="", keys=None
        )
        return submission.submit(request, store=store, ledger=ledger, lease_s=LEASE_S, listed=lambda _: None)

    return make


def work(ledger: Ledger, end: Callable[[str], ImageState], *, limit: int = 1000) -> int:
    """Claims and ends what is in the window; returns how many images."""
    ended = 0
    for image, message in list(ledger.entries())[:limit]:
        task = task_of(message)
        claim = ledger.claim(image, token=f"t{image}", output=f"s3://x/{task.key}", lease_s=LEASE_S)
        if claim.verdict == "go":
            state = end(task.key)
            failure = Failure(task.key, "damaged", "why", 1, 12.25, "w") if state is ImageState.FAILED else None
            assert ledger.finish(claim, state, failure) == "ok"
            ended += 1
    return ended


def close(dispatcher: Dispatcher, ledger: Ledger, job: Job) -> Job:
    def is_closed() -> bool:
        dispatcher.step()
        return ledger.job(job.id).closed is not None

    wait_until(is_closed, what="the job is closed")
    return ledger.job(job.id)


def nothing_left(ledger: Ledger) -> bool:
    names = ("waiting", "leased", "retry", "entry", "owner", "claim", "tries", "vanished", "blamed", "published")
    return not ledger._redis.exists(*(f"cf:{name}" for name in names))


def record(store: Store, places: Places, job: Job, name: str) -> str:
    return fetch(store, Location(Location.parse(places.to).bucket, f"_cutfleet/{job.id}/{name}")).decode()


def test_a_cancelled_job_ends_what_is_in_work_and_nothing_else(
    ledger: Ledger, dispatcher: Dispatcher, make_job: MakeJob
) -> None:
    job = make_job(90)
    dispatcher.step()
    work(ledger, lambda _: ImageState.DONE, limit=20)
    dispatcher.step()
    image, message = next(ledger.entries())
    output = f"s3://x/{task_of(message).key}"
    held = ledger.claim(image, token="held", output=output, lease_s=LEASE_S)

    assert ledger.cancel(job.id)
    dispatcher.step()
    assert ledger.job(job.id).open == 1, "what a worker holds is its own"
    assert ledger.claim(image, token="another", output=output, lease_s=LEASE_S).verdict == "busy"
    assert ledger.finish(held, ImageState.DONE) == "ok"
    closed = close(dispatcher, ledger, job)

    assert (closed.done, closed.cancelled_images, closed.window) == (21, 69, 0)
    assert nothing_left(ledger)
    assert not ledger.cancel(job.id)
    with pytest.raises(JobError, match="cancelled"):
        ledger.reopen(job.id, [1], states=[ImageState.FAILED])


def test_an_image_of_a_cancelled_job_that_waits_for_its_retry_is_final(
    ledger: Ledger, dispatcher: Dispatcher, make_job: MakeJob
) -> None:
    job = make_job(2)
    dispatcher.step()
    for image, message in list(ledger.entries()):
        output = f"s3://x/{task_of(message).key}"
        claim = ledger.claim(image, token="t", output=output, lease_s=LEASE_S)
        ledger.cancel(job.id)
        ledger.defer(claim, pause_s=0)

    closed = close(dispatcher, ledger, job)

    assert closed.cancelled_images == 2
    assert nothing_left(ledger)


@pytest.fixture
def large(store: Store, ledger: Ledger, places: Places) -> MakeJob:
    """A job that the ledger has in full, and the store the first part of: as many are fed."""

    def make(count: int) -> Job:
        request = submission.Request(
            source=places.source, destination=places.to, recipe=Recipe(), lane="backfill", name="", keys=None
        )
        job = submission.draft(request, job_id="20260101-000000-000000", store=store)
        ledger.create_job(job)
        lister = ledger.take_listing(job.id)
        for number in range(-(-count // PART_ROWS)):
            rows = min(PART_ROWS, count - number * PART_ROWS)
            part = ManifestPart(number, "a", "z", rows)
            if number == 0:
                objects = [S3Object(f"{index:05d}.jpg", "e", 1) for index in range(rows)]
                write_part(store, job, part, objects, is_next=lambda: True)
            ledger.add_part(
                job.id, lister, part, first=number * PART_ROWS, known=[number == 7 and n % 3 == 0 for n in range(rows)]
            )
        ledger.finish_listing(job.id)
        return ledger.job(job.id)

    return make


def test_a_million_images_are_cancelled_in_one_turn_but_for_what_is_final_or_held(
    ledger: Ledger, dispatcher: Dispatcher, large: MakeJob
) -> None:
    count = 1_000_001
    job = large(count)
    states = {
        index: ImageState(1 + index % 5) for index in (*range(20_000, 20_100), *range(30_001, 30_400, 7), count - 2)
    }
    for rows in (dict(list(states.items())[i : i + 50]) for i in range(0, len(states), 50)):
        ledger.restore(job.id, rows)
    dispatcher.step()
    held = [
        ledger.claim(image, token="t", output=f"s3://x/{image}", lease_s=LEASE_S)
        for image, _ in list(ledger.entries())[:5]
    ]
    ledger.defer(held.pop(), pause_s=1000)

    ledger.cancel(job.id)
    dispatcher.step()

    cancelled = ledger.job(job.id)
    assert (cancelled.open, cancelled.window) == (4, 4)
    assert not ledger.cancel_rest(ledger.lead(dispatcher._me, ttl_s=60) or 0, job.id, 0, []), "it is at its end"
    found = ledger.states(job.id, 0, count + 1)
    left = {index: state for index, state in enumerate(found) if state is not ImageState.CANCELLED}
    in_work = {int(claim.image.partition(":")[2]): ImageState.OPEN for claim in held}
    skipped = {70_000 + n: ImageState.SKIPPED for n in range(0, PART_ROWS, 3)}
    kept = {index: state for index, state in states.items() if state is not ImageState.CANCELLED}
    assert left == kept | in_work | skipped | {count: ImageState.OPEN}, "nor is what lies behind the last one touched"
    ledger.finish(held[0], ImageState.DONE)
    ledger.release(held[1], lease_s=LEASE_S)
    ledger.defer(held[2], pause_s=1000)
    ledger.vanish(held[3], "lost", lease_s=LEASE_S)
    ended = ledger.job(job.id)
    assert (ended.open, ended.window) == (0, 0)
    assert "state:     cancelling (its report is being written)" in job_lines(ended)
    assert not ledger.check(job.id, repair=False).counts
    assert nothing_left(ledger)


def test_a_dispatcher_killed_at_any_move_of_a_cancellation_is_followed_by_one_that_ends_it(
    ledger: Ledger, dispatcher: Dispatcher, store: Store, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.ledger.CANCEL_ROWS", 16)
    monkeypatch.setattr("jobs.ledger.FEED_ROWS", 5)
    monkeypatch.setattr("producer.dispatcher.dispatcher.CANCELS_A_TURN", 2)
    job = make_job(81)
    dispatcher.step()
    work(ledger, lambda _: ImageState.DONE, limit=9)
    (held,) = [
        ledger.claim(image, token="t", output="s3://x/y", lease_s=LEASE_S) for image, _ in [next(ledger.entries())]
    ]
    ledger.cancel(job.id)
    move = Ledger._move
    moves_left = lives = 0

    class Killed(BaseException): ...

    def killed(self: Ledger, name: str, *args: str | int | float | bytes) -> object:
        nonlocal moves_left
        if name.startswith("cancel_"):
            moves_left -= 1
            if moves_left < 0:
                raise Killed
        return move(self, name, *args)

    monkeypatch.setattr(Ledger, "_move", killed)
    while ledger.job(job.id).open > 1:
        ledger._redis.delete("cf:dispatcher")  # as its lock ends some time
        moves_left, lives = lives, lives + 1
        with contextlib.suppress(Killed):
            Dispatcher(ledger, store, Settings(lease_s=LEASE_S)).step()
        assert ledger.cancel(job.id), "a second one changes nothing"
    monkeypatch.undo()
    with pytest.raises(Fenced):
        ledger.cancel_rest(1, job.id, 0, [])
    ledger._redis.delete("cf:dispatcher")
    ledger.finish(held, ImageState.DONE)
    closed = close(dispatcher, ledger, job)

    assert lives > 2
    assert (closed.done, closed.cancelled_images, closed.window) == (10, 71, 0)
    assert not ledger.check(job.id, repair=False).counts
    assert nothing_left(ledger)


def test_a_job_that_is_cancelled_while_it_is_listed_is_whole_here_and_in_s3(
    ledger: Ledger, dispatcher: Dispatcher, store: Store, places: Places
) -> None:
    request = submission.Request(
        source=places.source,
        destination=places.to,
        recipe=Recipe(),
        lane="backfill",
        name="",
        keys=tuple(f"{number:05d}.jpg" for number in range(2 * PART_ROWS)),
    )

    def cancel(_: int) -> None:
        assert ledger.cancel(ledger.jobs()[0].id)
        dispatcher.step()

    with pytest.raises(JobError, match="cancelled while it was being listed"):
        submission.submit(request, store=store, ledger=ledger, lease_s=LEASE_S, listed=cancel)
    (job,) = ledger.jobs()
    with pytest.raises(JobError, match="submit its source again"):
        submission.resume(job.id, request, store=store, ledger=ledger, listed=lambda _: None)
    closed = close(dispatcher, ledger, job)

    def disagreements(what: str) -> list[Disagreement]:
        found = audit(what, repair=False, deep=False, ledger=ledger, store=store, seen=lambda _: None)
        return [one for one in found if one.code != "extra_object"]

    assert (closed.total, closed.cancelled_images) == (PART_ROWS, PART_ROWS)
    assert not disagreements(job.id)
    ledger._redis.flushdb()
    assert not disagreements(f"{places.to}_cutfleet/{job.id}/"), "the part that came too late is no part of it"


def test_failed_images_are_tried_again_by_code_and_a_closed_job_opens_and_closes_again(
    ledger: Ledger, store: Store, places: Places, dispatcher: Dispatcher, make_job: MakeJob
) -> None:
    job = make_job(6)
    dispatcher.step()
    work(ledger, lambda key: ImageState.FAILED if key < "p00004" else ImageState.REVIEW)
    closed = close(dispatcher, ledger, job)
    assert (closed.failed, closed.done) == (4, 2)
    assert len(record(store, places, job, "report/dead-000000.jsonl").splitlines()) == 4

    assert dead.retry(closed, "truncated", ledger=ledger, store=store) == 0
    assert dead.retry(closed, "damaged", ledger=ledger, store=store) == 4
    assert dead.retry(closed, "damaged", ledger=ledger, store=store) == 0
    again = ledger.job(job.id)
    assert (again.closed, again.failed, again.open, again.again) == (None, 0, 4, 4)
    assert (again.judged_final, again.judged_failed) == (2, 0), "only what fails from now on pauses it"
    dispatcher.step()
    tasks = [task_of(message) for _, message in ledger.entries()]
    assert {(task.key, task.etag) for task in tasks} == {(f"p0000{n}.jpg", "") for n in range(4)}
    work(ledger, lambda key: ImageState.FAILED if key == "p00000.jpg" else ImageState.DONE)
    closed = close(dispatcher, ledger, job)

    assert (closed.failed, closed.done, closed.open, closed.again, closed.window) == (1, 5, 0, 0, 0)
    assert json.loads(record(store, places, job, "report/summary.json"))["failed"] == 1
    assert len(record(store, places, job, "report/dead-000000.jsonl").splitlines()) == 1
    assert nothing_left(ledger)
    assert ledger._redis.ttl(f"cf:job:{job.id}") > 0


def test_a_job_that_mostly_fails_is_paused_until_a_person_has_looked(
    ledger: Ledger, dispatcher: Dispatcher, make_job: MakeJob
) -> None:
    job = make_job(330)

    def turn(state: ImageState) -> None:
        dispatcher.step()
        work(ledger, lambda _: state)

    while ledger.job(job.id).paused is None:
        turn(ImageState.FAILED)
    paused = ledger.job(job.id)
    assert paused.final < 200
    assert "too_many_failures" in str(paused.paused)
    for _ in range(3):
        turn(ImageState.FAILED)
    assert ledger.job(job.id).cursor == paused.cursor, "nothing more is fed"

    assert ledger.unpause(job.id)
    assert not ledger.unpause(job.id)
    while ledger.job(job.id).open:
        turn(ImageState.DONE)

    assert ledger.job(job.id).paused is None


def test_more_failures_than_redis_should_hold_stand_in_s3_and_are_found_there(
    stack: LocalStack,
    cutfleet: Run,
    ledger: Ledger,
    store: Store,
    dispatcher: Dispatcher,
    make_job: MakeJob,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dead, "MAX_HELD", 10)
    monkeypatch.setattr("producer.dispatcher.dispatcher.MAX_HELD", 10)
    monkeypatch.setattr(dead, "SPILL_ROWS", 8)
    job = make_job(40)
    dispatcher.step()
    work(ledger, lambda _: ImageState.FAILED)
    before = ledger.job(job.id)
    while dispatcher.step():
        pass

    spilled = ledger.job(job.id)
    assert sorted(dict(dead.failures_of(before, ledger=ledger, store=store))) == list(range(40)), "whoever asked before"
    assert spilled.spills >= 2
    assert ledger.failures_held(job.id) == 40 - 8 * spilled.spills
    letters = dict(dead.failures_of(spilled, ledger=ledger, store=store))
    assert sorted(letters) == list(range(40))
    assert letters[3].key == "p00003.jpg"
    env = {"CUTFLEET_REDIS_URL": stack.environment["CUTFLEET_REDIS_URL"].replace("/0", "/7")}
    shown = cutfleet("status", job.id, "--failed", env=env).stdout
    assert [line.split("\t")[0] for line in shown.splitlines()] == [f"p{number:05d}.jpg" for number in range(40)]
    assert dead.retry(spilled, None, ledger=ledger, store=store) == 40
    dispatcher.step()
    work(ledger, lambda key: ImageState.FAILED if key == "p00003.jpg" else ImageState.DONE)
    closed = close(dispatcher, ledger, job)
    assert [index for index, _ in dead.failures_of(closed, ledger=ledger, store=store)] == [3]


def test_a_job_that_is_forgotten_leaves_the_list(ledger: Ledger, dispatcher: Dispatcher, make_job: MakeJob) -> None:
    def do_one() -> Job:
        job = make_job(1)
        dispatcher.step()
        work(ledger, lambda _: ImageState.DONE)
        return close(dispatcher, ledger, job)

    first = do_one()
    ledger._redis.delete(f"cf:job:{first.id}")  # as when its days are over
    assert first.id in ledger._redis.zrange("cf:jobs", 0, -1)
    do_one()

    assert first.id not in ledger._redis.zrange("cf:jobs", 0, -1)


def test_old_jobs_that_never_close_keep_no_forgotten_one_in_the_list(
    ledger: Ledger, store: Store, places: Places
) -> None:
    request = submission.Request(
        source=places.source, destination=places.to, recipe=Recipe(), lane="backfill", name="", keys=None
    )
    job = submission.draft(request, job_id="paused", store=store)
    epoch = ledger.lead("me", ttl_s=60)
    assert epoch is not None
    for number in range(20):
        ledger.create_job(dataclasses.replace(job, id=f"paused-{number}"))

    for number in range(300):
        ledger.create_job(dataclasses.replace(job, id=f"short-{number}"))
        ledger.finish_listing(f"short-{number}")
        assert ledger.close_job(epoch, f"short-{number}", keep_s=0), "forgotten at once"

    assert ledger._redis.zcard("cf:jobs") < 100
    assert len(ledger.jobs(limit=100)) == 20, "what is not forgotten stays"


def test_the_live_screen_shows_rate_time_left_queues_workers_failures_and_review(
    ledger: Ledger, dispatcher: Dispatcher, make_job: MakeJob
) -> None:
    job = make_job(20)
    dispatcher.step()
    facts = {"model": job.model, "slots": 4, "in_flight": 3, "images": 77, "rate": 9.5}
    ledger.heartbeat("gpu0@host", facts, ttl_s=60)
    pace, codes, console = Pace(), Codes(), Console(record=True, width=200, file=io.StringIO())
    pace.look(0, 0)
    work(ledger, lambda key: ImageState.FAILED if key < "p00002" else ImageState.REVIEW)
    found = ledger.job(job.id)
    pace.look(5, found.final)

    survey = ledger.survey(worker_queues(job.model))
    console.print(screen(found, pace, survey, ledger.workers(), codes.of(found, ledger)))

    shown = console.export_text()
    assert "rate:      4.0 a second, 0 s left" in shown
    assert f"20 on backfill.{job.model}; 0 held by workers" in shown
    assert "failures:  2 damaged" in shown
    assert "18 to review" in shown
    assert [line.split() for line in shown.splitlines() if "gpu0@host" in line] == [["gpu0@host", "3", "77", "9.5"]]


def test_pace_forgets_what_is_long_past() -> None:
    pace = Pace()
    pace.look(0, 0)
    assert (pace.rate, pace.remaining_s(10)) == (None, None)
    pace.look(10_000, 50)
    assert pace.rate is None, "the night before does not count"

    pace.look(10_010, 150)

    assert (pace.rate, pace.remaining_s(100)) == (10, 10)


def test_the_live_screen_ends_with_its_job(ledger: Ledger, dispatcher: Dispatcher, make_job: MakeJob) -> None:
    job = make_job(3)
    dispatcher.step()
    work(ledger, lambda _: ImageState.DONE)
    close(dispatcher, ledger, job)
    console = Console(record=True, width=200, file=io.StringIO())

    assert watch_job(job.id, ledger, console=console).done == 3

    assert "closed" in console.export_text()


def test_what_is_read_in_steps_is_read_whole(
    ledger: Ledger, dispatcher: Dispatcher, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.ledger.JOBS_AT_ONCE", 2)
    monkeypatch.setattr("jobs.ledger.MESSAGES_AT_ONCE", 3)
    jobs = [make_job(2).id for _ in range(5)]
    wait_until(lambda: dispatcher.step() or all(job.cursor == 2 for job in ledger.open_jobs()), what="all is fed")

    assert [job.id for job in ledger.jobs()] == [job.id for job in ledger.jobs(limit=5)] == jobs[::-1]
    assert [job.id for job in ledger.jobs(limit=3)] == jobs[:1:-1]
    assert [job.id for job in ledger.open_jobs()] == sorted(jobs)
    queue = lane_queue("backfill", Recipe().model)
    assert ledger.images_with_message([queue]) == {f"{job}:{index}" for job in jobs for index in (0, 1)}
