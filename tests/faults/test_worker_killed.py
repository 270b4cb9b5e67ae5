"""A worker is killed, frozen or sent away, wherever it is with an image."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
import redis

from jobs.broker import lane_queue
from jobs.s3.client import Location
from tests.faults.fleet import IMAGES, Fleet, Reference, Submit, is_stopped, listening, make_places, submit_to
from tests.faults.terms import MODEL, PLACES
from tests.faults.truth import prove
from tests.support.factories import Places, put_images, sample_image, wait_until

KILLS = 30


def test_killed_at_every_boundary_a_worker_loses_no_image_and_shows_no_half_one(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, tmp_path: Path
) -> None:
    names = put_images(fleet.store, places, IMAGES)
    flags = {place: tmp_path / place for place in PLACES}
    failpoints = ",".join(f"{place}={flag}" for place, flag in flags.items())
    fleet.workers.start(supervised=True, slots="2", test_failpoints=failpoints)
    with fleet.dispatcher():
        job = submit()
        for deaths in range(1, len(PLACES) + 1):
            wait_until(lambda deaths=deaths: len(fleet.workers.ends()) >= deaths, what="the worker is killed")
            no_half_image(fleet, places)

        truth = prove(fleet, job, places, names=names, reference=reference)

    assert truth.counts["done"] == IMAGES
    assert all(flag.exists() for flag in flags.values())
    assert list(fleet.workers.ends().values()) == [-signal.SIGKILL] * len(PLACES)
    assert fleet.workers.dismiss() == [0]


def no_half_image(fleet: Fleet, places: Places) -> None:
    """Who sees a cutout sees its mask."""
    to = Location.parse(places.to)
    for found in fleet.store.list_source(Location(to.bucket, "cutouts/")):
        cutout = fleet.store.head(Location(to.bucket, found.key), role="output")
        mask = fleet.store.head(Location(to.bucket, found.key.replace("cutouts/", "masks/", 1)), role="output")
        assert cutout is not None
        assert mask is not None
        assert cutout.metadata["cf-mask-etag"] == mask.etag


@pytest.mark.timeout(600)
def test_thirty_random_kills_lose_no_image_and_convict_none(fleet: Fleet, places: Places, reference: Reference) -> None:
    """A third of the workers is frozen first, some for longer than a lease."""
    chance = random.Random(7)
    names = put_images(fleet.store, places, 60)
    for _ in range(4):
        fleet.workers.start(supervised=True, slots="4", test_device_ms="300")
    before = len(fleet.workers.ends())
    jobs: dict[str, Places] = {}

    def final() -> int:
        return sum(fleet.ledger.job(job).final for job in jobs)

    def progress() -> None:
        target = min(final() + chance.randint(0, 6), len(jobs) * len(names))
        wait_until(lambda: final() >= target)

    with fleet.dispatcher():
        while len(fleet.workers.ends()) - before < KILLS:
            if final() > len(jobs) * len(names) - 16:
                fresh = Places(places.source, make_places(fleet).to)
                jobs[submit_to(fleet, fresh)] = fresh
            progress()
            victim = chance.choice(fleet.workers.alive())
            if chance.random() < 1 / 3:
                os.kill(victim, signal.SIGSTOP)
                progress()
            fleet.workers.kill(victim)
            wait_until(lambda: len(fleet.workers.alive()) == 4)

        truths = [prove(fleet, job, to, names=names, reference=reference, within_s=150) for job, to in jobs.items()]

    assert [truth.counts["done"] for truth in truths] == [len(names)] * len(jobs)


@pytest.mark.usefixtures("asleep")
def test_an_idle_worker_that_is_frozen_and_killed_takes_no_message_with_it(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, 8)
    frozen = fleet.workers.start(test_poll_s="60")  # so that it is handed a message though frozen
    known = fleet.dispatchers.text().count("messages were lost")
    with redis.Redis(port=fleet.stack.redis_port, decode_responses=True) as broker:
        wait_until(lambda: listening(broker) == 1, what="the worker waits for a message")
    os.kill(frozen, signal.SIGSTOP)
    with fleet.dispatcher():
        job = submit()
        wait_until(lambda: fleet.ledger.queue_depth(lane_queue("backfill", MODEL)) >= len(names) - 1)
        os.kill(frozen, signal.SIGKILL)
        fleet.workers.start()

        truth = prove(fleet, job, places, names=names, reference=reference)

    assert fleet.dispatchers.text().count("messages were lost") > known, "one left its list and was nowhere"
    assert truth.counts["done"] == len(names)
    assert fleet.workers.dismiss() == [0]


def test_a_worker_that_wakes_after_a_newer_version_was_published_overwrites_nothing(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, tmp_path: Path
) -> None:
    names = put_images(fleet.store, places, 4)
    flags = [tmp_path / place for place in ("after_model", "after_mask")]
    freezes = ",".join(f"{flag.name}={flag}" for flag in flags)
    sleeper = fleet.workers.start(slots="4", test_freezepoints=freezes)
    with fleet.dispatcher():
        old = submit()
        wait_until(lambda: is_stopped(sleeper))
        fleet.workers.start()
        prove(fleet, old, places, names=names, reference=reference, alone=False)
        for number, name in enumerate(names, 50):
            fleet.store.put(places.key(name), sample_image(seed=number), content_type="image/jpeg")
        new = submit()
        truth = prove(fleet, new, places, names=names, reference={}, alone=False)
        newest = {name: fleet.store.head(places.cutout(name), role="output") for name in names}

        os.kill(sleeper, signal.SIGCONT)
        assert set(fleet.workers.dismiss()) == {0}, "what it had computed it has tried to publish by then"
        fleet.workers.start()  # a message that the sleeper has put back is somebody's
        prove(fleet, new, places, names=names, reference={})

    assert truth.counts["done"] == len(names)
    assert {name: fleet.store.head(places.cutout(name), role="output") for name in names} == newest


def test_told_to_go_under_load_workers_drain_and_nothing_runs_twice(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    """The grace is as in `SETTINGS`: at its end a worker would leave with another code than 0."""
    names = put_images(fleet.store, places, 80)
    *leaving, _ = [fleet.workers.start(slots="6", test_device_ms="200") for _ in range(3)]
    with fleet.dispatcher():
        job = submit()
        wait_until(lambda: fleet.ledger.job(job).done >= 4)
        assert fleet.ledger.job(job).open > 18, "they must leave under load"
        for pid in leaving:
            os.kill(pid, signal.SIGTERM)
        assert [fleet.workers.wait_for(pid) for pid in leaving] == [0, 0]

        truth = prove(fleet, job, places, names=names, reference=reference)

    assert truth.counts["done"] == len(names)
    assert set(fleet.workers.published(places).values()) == {1}
    assert fleet.workers.dismiss() == [0]
