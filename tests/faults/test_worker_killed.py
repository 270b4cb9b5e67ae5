"""A worker is killed, frozen or stopped, at any step of an image."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
import redis

from jobs.message import queue_name
from jobs.s3.location import Location
from tests.faults.broker import count_waiting_workers
from tests.faults.fleet import IMAGES, Fleet, Reference, Submit
from tests.faults.invariants import assert_exact
from tests.faults.proc import is_stopped
from tests.faults.stand_in_settings import FAILPOINTS, MODEL
from tests.support.images import put_images, sample_image
from tests.support.places import Places
from tests.support.waiting import wait_until

KILLS = 30


def test_a_worker_that_is_killed_at_each_step_loses_no_image_and_publishes_none_in_part(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, tmp_path: Path
) -> None:
    names = put_images(fleet.store, places, IMAGES)
    flags = {point: tmp_path / point for point in FAILPOINTS}
    failpoints = ",".join(f"{point}={flag}" for point, flag in flags.items())
    fleet.workers.start_supervised(slots="2", test_failpoints=failpoints)
    with fleet.dispatcher():
        job = submit()
        for deaths in range(1, len(FAILPOINTS) + 1):
            wait_for_deaths(fleet, deaths)
            assert_each_cutout_has_its_mask(fleet, places)

        outcome = assert_exact(fleet, job, places, names=names, reference=reference)

    assert outcome.counts["done"] == IMAGES
    assert all(flag.exists() for flag in flags.values())
    assert list(fleet.workers.exit_codes().values()) == [-signal.SIGKILL] * len(FAILPOINTS)
    assert fleet.workers.terminate() == [0]


def wait_for_deaths(fleet: Fleet, count: int) -> None:
    wait_until(lambda: len(fleet.workers.exit_codes()) >= count, what=f"{count} workers were killed")


def assert_each_cutout_has_its_mask(fleet: Fleet, places: Places) -> None:
    bucket = places.destination.bucket
    for found in fleet.store.list_source(Location(bucket, "cutouts/")):
        cutout = fleet.store.head(Location(bucket, found.key), role="output")
        mask = fleet.store.head(Location(bucket, found.key.replace("cutouts/", "masks/", 1)), role="output")
        assert cutout is not None
        assert mask is not None
        assert cutout.metadata["cf-mask-etag"] == mask.etag


@pytest.mark.timeout(600)
def test_thirty_random_kills_lose_no_image_and_fail_none(fleet: Fleet, places: Places, reference: Reference) -> None:
    """A third of the killed workers is frozen first, some for longer than a lease."""
    rng = random.Random(7)
    names = put_images(fleet.store, places, 60)
    for _ in range(4):
        fleet.workers.start_supervised(slots="4", test_device_ms="300")
    earlier = len(fleet.workers.exit_codes())
    jobs: dict[str, Places] = {}

    def count_final() -> int:
        return sum(fleet.ledger.jobs.get(job).final for job in jobs)

    def wait_for_progress() -> None:
        target = min(count_final() + rng.randint(0, 6), len(jobs) * len(names))
        wait_until(lambda: count_final() >= target)

    with fleet.dispatcher():
        while len(fleet.workers.exit_codes()) - earlier < KILLS:
            if count_final() > len(jobs) * len(names) - 16:
                fresh = Places(places.source, fleet.create_places().to)
                jobs[fleet.submit(fresh)] = fresh
            wait_for_progress()
            victim = rng.choice(fleet.workers.alive())
            if rng.random() < 1 / 3:
                os.kill(victim, signal.SIGSTOP)
                wait_for_progress()
            fleet.workers.kill(victim)
            wait_until(lambda: len(fleet.workers.alive()) == 4)

        outcomes = [
            assert_exact(fleet, job, to, names=names, reference=reference, within_s=150) for job, to in jobs.items()
        ]

    assert [outcome.counts["done"] for outcome in outcomes] == [len(names)] * len(jobs)


@pytest.mark.usefixtures("fake_worker")
def test_a_message_that_a_frozen_worker_took_before_it_was_killed_is_published_again(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, 8)
    frozen = fleet.workers.start(test_poll_s="60")  # the server gives it a message although it is frozen
    earlier = fleet.dispatchers.log_text().count("messages were lost")
    with redis.Redis(port=fleet.stack.redis_port, decode_responses=True) as broker:
        wait_until(lambda: count_waiting_workers(broker) == 1, what="the worker waits for a message")
    os.kill(frozen, signal.SIGSTOP)
    with fleet.dispatcher():
        job = submit()
        wait_until(lambda: fleet.ledger.window.queue_length(queue_name("backfill", MODEL)) >= len(names) - 1)
        os.kill(frozen, signal.SIGKILL)
        fleet.workers.start()

        outcome = assert_exact(fleet, job, places, names=names, reference=reference)

    assert fleet.dispatchers.log_text().count("messages were lost") > earlier, "a message was lost"
    assert outcome.counts["done"] == len(names)
    assert fleet.workers.terminate() == [0]


def test_a_worker_that_resumes_after_a_newer_version_was_published_overwrites_nothing(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, tmp_path: Path
) -> None:
    names = put_images(fleet.store, places, 4)
    flags = [tmp_path / point for point in ("after_model", "after_mask")]
    freezes = ",".join(f"{flag.name}={flag}" for flag in flags)
    frozen_worker = fleet.workers.start(slots="4", test_freezepoints=freezes)
    with fleet.dispatcher():
        old = submit()
        wait_until(lambda: is_stopped(frozen_worker))
        fleet.workers.start()
        assert_exact(fleet, old, places, names=names, reference=reference, only_job=False)
        for number, name in enumerate(names, 50):
            fleet.store.put(places.key(name), sample_image(seed=number), content_type="image/jpeg")
        new = submit()
        outcome = assert_exact(fleet, new, places, names=names, reference={}, only_job=False)
        newest = {name: fleet.store.head(places.cutout(name), role="output") for name in names}

        os.kill(frozen_worker, signal.SIGCONT)
        assert set(fleet.workers.terminate()) == {0}, "the resumed worker has tried to publish"
        fleet.workers.start()  # takes messages that the resumed worker returned to the queue
        assert_exact(fleet, new, places, names=names, reference={})

    assert outcome.counts["done"] == len(names)
    assert {name: fleet.store.head(places.cutout(name), role="output") for name in names} == newest


def test_workers_that_are_stopped_under_load_drain_and_no_image_is_published_twice(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    """A worker that does not drain within `CUTFLEET_DRAIN_S` of `SETTINGS` would exit with another code than 0."""
    names = put_images(fleet.store, places, 80)
    *stopped, _ = [fleet.workers.start(slots="6", test_device_ms="200") for _ in range(3)]
    with fleet.dispatcher():
        job = submit()
        wait_until(lambda: fleet.ledger.jobs.get(job).done >= 4)
        assert fleet.ledger.jobs.get(job).open > 18, "they are stopped under load"
        for pid in stopped:
            os.kill(pid, signal.SIGTERM)
        assert [fleet.workers.wait_for(pid) for pid in stopped] == [0, 0]

        outcome = assert_exact(fleet, job, places, names=names, reference=reference)

    assert outcome.counts["done"] == len(names)
    assert set(fleet.workers.publish_counts(places).values()) == {1}
    assert fleet.workers.terminate() == [0]
