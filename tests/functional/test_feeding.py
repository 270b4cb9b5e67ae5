"""Who is fed, and how fast: weights, rates, samples, and changes while a job runs."""

from __future__ import annotations

from jobs.job import ImageState, Job
from jobs.ledger import Ledger
from jobs.s3.client import Store
from producer.demo.local_stack import LocalStack
from producer.dispatcher.feeder import MIN_WINDOW, Allowance, Feeder, Shares
from producer.dispatcher.job_backoff import HeldUp
from producer.records.manifest import read_part
from tests.support.environment import Run, alone_url
from tests.support.factories import Places, make


class Hand:
    """A dispatcher's feeding turn by turn, its clock in the test's hand, and workers that finish what they are told."""

    def __init__(self, ledger: Ledger, store: Store) -> None:
        self.ledger = ledger
        self.now = 0.0
        self.feeder = Feeder(ledger, store, lease_s=60, held_up=HeldUp(), clock=lambda: self.now)
        epoch = ledger.lead("test", ttl_s=60)
        assert epoch is not None
        self.epoch = epoch

    def turn(self, *, seconds: float = 0.0) -> None:
        self.now += seconds
        self.feeder.feed(self.epoch, self.ledger.open_jobs())

    def fed(self, job: Job) -> int:
        return self.ledger.job(job.id).cursor

    def finish(self, job: Job, first: int, end: int) -> None:
        for index in range(first, end):
            claim = self.ledger.claim(f"{job.id}:{index}", token=job.id, output=f"{job.id}/{index}", lease_s=60)
            assert self.ledger.finish(claim, ImageState.DONE) == "ok"


def test_room_goes_by_weight_however_little_there_is_at_once() -> None:
    shares = Shares()
    given = {"a": 0, "b": 0, "c": 0}

    for _ in range(100):
        for job, count in shares.divide(1, dict.fromkeys(given, 1000), {"a": 3, "b": 1, "c": 1}).items():
            given[job] += count

    assert given == {"a": 60, "b": 20, "c": 20}


def test_who_comes_late_or_was_idle_does_not_take_everything() -> None:
    shares = Shares()
    shares.divide(1000, {"old": 5000}, {"old": 1})

    assert shares.divide(10, {"old": 100, "new": 100}, {"old": 1, "new": 1}) == {"old": 5, "new": 5}
    shares.divide(1000, {"old": 5000}, {"old": 1})
    assert shares.divide(10, {"old": 100, "new": 100}, {"old": 1, "new": 1}) == {"old": 5, "new": 5}


def test_what_one_job_can_not_use_goes_to_the_others() -> None:
    assert Shares().divide(100, {"small": 3, "large": 500}, {"small": 9, "large": 1}) == {"small": 3, "large": 97}


def test_several_backfills_run_side_by_side_by_weight(alone: Ledger, store: Store, places: Places) -> None:
    first = make(places, alone, store)
    hand = Hand(alone, store)
    hand.turn()
    second = make(places, alone, store, weight=3)

    assert hand.fed(first) == MIN_WINDOW
    hand.turn()
    assert hand.fed(second) == 0, "the window is full"
    hand.finish(first, 0, 40)
    hand.turn()

    assert (hand.fed(first) - MIN_WINDOW, hand.fed(second)) == (10, 30)


def test_a_rate_is_kept_and_can_be_changed_while_it_runs(alone: Ledger, store: Store, places: Places) -> None:
    job = make(places, alone, store, rate=10)
    hand = Hand(alone, store)
    hand.turn()

    for _ in range(10):
        hand.turn(seconds=0.25)
    assert hand.fed(job) == 25
    hand.turn(seconds=60)
    assert hand.fed(job) == 45, "what was missed for long is not made up for"
    assert alone.tune(job.id, rate=0)
    hand.turn()

    assert hand.fed(job) == MIN_WINDOW


def test_a_dispatcher_that_takes_over_does_not_begin_with_a_burst() -> None:
    job = Job(
        id="j",
        name="",
        source="s3://in/",
        destination="s3://out/",
        recipe="{}",
        model="m",
        lane="backfill",
        conditional=True,
        created=0,
        rate=50,
        total=10**6,
    )

    assert Allowance().of(job, 1e9) == 0


def test_a_sample_is_looked_at_before_the_same_job_goes_on(alone: Ledger, store: Store, places: Places) -> None:
    job = make(places, alone, store, sample=20)
    hand = Hand(alone, store)
    hand.turn()
    hand.turn()
    found = alone.job(job.id)
    assert (found.cursor, str(found.state)) == (20, "paused")
    assert "first 20" in str(found.paused)
    hand.finish(job, 0, 20)

    alone.unpause(job.id)
    hand.turn()

    found = alone.job(job.id)
    assert (found.cursor, found.done, found.sample) == (20 + MIN_WINDOW, 20, None)


def test_a_sample_that_is_paused_by_hand_before_its_end_stays_one(alone: Ledger, store: Store, places: Places) -> None:
    job = make(places, alone, store, sample=20)
    alone.pause(job.id, "by hand")

    alone.unpause(job.id)

    assert alone.job(job.id).sample == 20


def test_tune_changes_a_running_job_and_refuses_a_closed_one(
    stack: LocalStack, cutfleet: Run, alone: Ledger, store: Store, places: Places
) -> None:
    env = {"CUTFLEET_REDIS_URL": alone_url(stack)}
    job = make(places, alone, store, count=1)

    assert cutfleet("tune", job.id, "--weight", "7", "--rate", "2.5", "--lane", "live", env=env).returncode == 0
    found = alone.job(job.id)
    assert (found.weight, found.rate, found.lane) == (7, 2.5, "live")
    hand = Hand(alone, store)
    hand.turn()
    hand.turn(seconds=1)
    assert (alone.queue_depth("live.u2netp"), alone.queue_depth("backfill.u2netp")) == (1, 0), "it is first now"
    hand.finish(job, 0, 1)
    assert alone.close_job(hand.epoch, job.id, keep_s=60)

    refused = cutfleet("tune", job.id, "--weight", "1", env=env)

    assert refused.returncode == 2
    assert "[job_closed]" in refused.stderr


def test_a_submission_takes_what_patterns_sizes_and_dates_say(
    stack: LocalStack, cutfleet: Run, alone: Ledger, store: Store, places: Places
) -> None:
    env = {"CUTFLEET_REDIS_URL": alone_url(stack)}
    for name, size in (("a.jpg", 10), ("b.jpg", 20_000), ("c.txt", 10), ("old/d.jpg", 10)):
        store.put(places.key(name), b"x" * size, content_type="image/jpeg")
    limits = ["--include", "*.jpg", "--exclude", "old/*", "--max-mb", "0.01", "--since", "2020-01-01"]

    job = cutfleet("submit", places.source, "--to", places.to, *limits, env=env).stdout.strip()

    assert [task.key for task in read_part(store, alone.job(job), 0)] == ["a.jpg"]
    refused = cutfleet("submit", places.source, "a.jpg", "--to", places.to, *limits, env=env)
    assert refused.returncode == 2
    assert "for a listing" in refused.stderr
