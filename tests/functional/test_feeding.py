"""Feeding: weights, rates, samples, and changes to a running job."""

from __future__ import annotations

from jobs.job import Job, JobState
from jobs.ledger import Ledger
from jobs.s3.client import Store
from producer.demo.local_stack import LocalStack
from producer.dispatcher.feeder import MIN_WINDOW, Feeder
from producer.dispatcher.job_backoff import JobBackoff
from producer.records.manifest import read_part
from tests.support.environment import Run, own_redis_url
from tests.support.places import Places
from tests.support.submissions import submit_keys
from tests.support.work import finish_image, lead


class FeedingTurns:
    """Takes a dispatcher's feeding turns one by one, with a clock that the test sets."""

    def __init__(self, ledger: Ledger, store: Store) -> None:
        self.epoch = lead(ledger)
        self._ledger = ledger
        self._now = 0.0
        self._feeder = Feeder(ledger, store, lease_s=60, backoff=JobBackoff(), clock=lambda: self._now)

    def take(self, *, after_s: float = 0.0) -> None:
        self._now += after_s
        self._feeder.feed(self.epoch, self._ledger.jobs.open())

    def fed(self, job: Job) -> int:
        return self._ledger.jobs.get(job.id).cursor

    def finish(self, job: Job, first: int, end: int) -> None:
        for index in range(first, end):
            finish_image(job, index, self._ledger)


def test_two_backfills_share_a_queue_by_weight(own_ledger: Ledger, store: Store, places: Places) -> None:
    first = submit_keys(places, own_ledger, store)
    turns = FeedingTurns(own_ledger, store)
    turns.take()
    second = submit_keys(places, own_ledger, store, weight=3)

    assert turns.fed(first) == MIN_WINDOW
    turns.take()
    assert turns.fed(second) == 0, "the window is full"
    turns.finish(first, 0, 40)
    turns.take()

    assert (turns.fed(first) - MIN_WINDOW, turns.fed(second)) == (10, 30)


def test_a_rate_limits_feeding_and_can_be_removed_from_a_running_job(
    own_ledger: Ledger, store: Store, places: Places
) -> None:
    job = submit_keys(places, own_ledger, store, rate=10)
    turns = FeedingTurns(own_ledger, store)
    turns.take()

    for _ in range(10):
        turns.take(after_s=0.25)
    assert turns.fed(job) == 25
    turns.take(after_s=60)
    assert turns.fed(job) == 45, "a long pause is caught up on only in part"
    assert own_ledger.jobs.tune(job.id, rate=0)
    turns.take()

    assert turns.fed(job) == MIN_WINDOW


def test_a_job_is_paused_after_its_sample_and_continues_after_unpause(
    own_ledger: Ledger, store: Store, places: Places
) -> None:
    job = submit_keys(places, own_ledger, store, sample=20)
    turns = FeedingTurns(own_ledger, store)
    turns.take()
    turns.take()
    paused = own_ledger.jobs.get(job.id)
    assert (paused.cursor, paused.state) == (20, JobState.PAUSED)
    assert "sample of 20" in str(paused.paused)
    turns.finish(job, 0, 20)

    own_ledger.jobs.unpause(job.id)
    turns.take()

    found = own_ledger.jobs.get(job.id)
    assert (found.cursor, found.done, found.sample) == (20 + MIN_WINDOW, 20, None)


def test_a_pause_by_hand_before_the_end_of_the_sample_keeps_the_sample(
    own_ledger: Ledger, store: Store, places: Places
) -> None:
    job = submit_keys(places, own_ledger, store, sample=20)
    own_ledger.jobs.pause(job.id, "by hand")

    own_ledger.jobs.unpause(job.id)

    assert own_ledger.jobs.get(job.id).sample == 20


def test_tune_changes_a_running_job_and_refuses_a_closed_one(
    stack: LocalStack, cutfleet: Run, own_ledger: Ledger, store: Store, places: Places
) -> None:
    env = {"CUTFLEET_REDIS_URL": own_redis_url(stack)}
    job = submit_keys(places, own_ledger, store, count=1)

    assert cutfleet("tune", job.id, "--weight", "7", "--rate", "2.5", "--lane", "live", env=env).returncode == 0
    tuned = own_ledger.jobs.get(job.id)
    assert (tuned.weight, tuned.rate, tuned.lane) == (7, 2.5, "live")
    turns = FeedingTurns(own_ledger, store)
    turns.take()
    turns.take(after_s=1)
    lengths = [own_ledger.window.queue_length(queue) for queue in ("live.u2netp", "backfill.u2netp")]
    assert lengths == [1, 0]
    turns.finish(job, 0, 1)
    assert own_ledger.dispatch.close(turns.epoch, job.id, keep_s=60)

    refused = cutfleet("tune", job.id, "--weight", "1", env=env)

    assert refused.returncode == 2
    assert "[job_closed]" in refused.stderr


def test_a_submission_takes_only_objects_that_match_patterns_sizes_and_dates(
    stack: LocalStack, cutfleet: Run, own_ledger: Ledger, store: Store, places: Places
) -> None:
    env = {"CUTFLEET_REDIS_URL": own_redis_url(stack)}
    for name, size in (("a.jpg", 10), ("b.jpg", 20_000), ("c.txt", 10), ("old/d.jpg", 10)):
        store.put(places.key(name), b"x" * size, content_type="image/jpeg")
    limits = ["--include", "*.jpg", "--exclude", "old/*", "--max-mb", "0.01", "--since", "2020-01-01"]

    job = cutfleet("submit", places.source, "--to", places.to, *limits, env=env).stdout.strip()

    assert [task.key for task in read_part(store, own_ledger.jobs.get(job), 0)] == ["a.jpg"]
    refused = cutfleet("submit", places.source, "a.jpg", "--to", places.to, *limits, env=env)
    assert refused.returncode == 2
    assert "filter a listing" in refused.stderr
