"""Messages are delivered twice, or no worker takes them, or their source has been replaced."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import redis

from jobs.message import queue_name
from jobs.s3.location import Location
from tests.faults.fleet import Fleet, Reference, Submit
from tests.faults.invariants import assert_exact
from tests.faults.proc import is_stopped
from tests.faults.processes import LONG_LEASE_S
from tests.faults.stand_in_settings import MODEL
from tests.support.images import put_images, sample_image
from tests.support.places import Places
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("fake_worker")
LIVE, BACKFILL = (queue_name(lane, MODEL) for lane in ("live", "backfill"))
LEASES = 60
"""Number of expired leases: an hour at the default of one minute."""


def test_a_hundred_images_with_two_messages_each_are_claimed_once_each(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, 100)
    job = submit("--lane", "live")
    with redis.Redis(port=fleet.stack.redis_port, decode_responses=True) as broker:
        double(broker, LIVE)
        assert broker.llen(LIVE) == 200
    for _ in range(2):
        fleet.workers.fork(slots="8", lease_s=LONG_LEASE_S)
    with fleet.dispatcher(lease_s=LONG_LEASE_S):
        outcome = assert_exact(fleet, job, places, names=names, reference=reference)

    assert outcome.counts["done"] == 100
    assert sorted(fleet.workers.claim_counts(job).values()) == [1] * 100
    assert sorted(fleet.workers.publish_counts(places).values()) == [1] * 100
    assert fleet.workers.terminate() == [0, 0]


def double(broker: redis.Redis, queue: str) -> None:
    """Add a second message to each message of the queue, with another delivery tag."""
    messages: list[str] = broker.lrange(queue, 0, -1)  # type: ignore[assignment]  # the types cover asyncio too
    both: list[str] = []
    for message in messages:
        second = json.loads(message)
        second["properties"]["delivery_tag"] += "-second"
        both += [message, json.dumps(second)]
    with broker.pipeline() as pipe:
        pipe.delete(queue)
        pipe.rpush(queue, *both)
        pipe.execute()


def test_the_queue_does_not_grow_during_an_hour_without_workers(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, 16)
    with fleet.dispatcher(test_pause_s="0.02"), redis.Redis(port=fleet.stack.redis_port) as broker:
        job = submit()
        wait_until(lambda: broker.zcard("cf:waiting") == len(names))
        for _ in range(LEASES):
            broker.zadd("cf:waiting", dict.fromkeys(broker.zrange("cf:waiting", 0, -1), 0), xx=True)
            wait_until(
                lambda: broker.zcount("cf:waiting", 0, 0) == 0, what="the dispatcher has extended their deadlines"
            )
            assert broker.llen(BACKFILL) == len(names)
        fleet.ledger.jobs.tune(job, lane="live")
        for _ in range(3):
            broker.zadd("cf:waiting", dict.fromkeys(broker.zrange("cf:waiting", 0, -1), 0), xx=True)
            wait_until(
                lambda: broker.zcount("cf:waiting", 0, 0) == 0, what="the dispatcher has extended their deadlines"
            )
            assert broker.llen(BACKFILL) == len(names), "a queued image stays on its queue after `tune`"
    with fleet.dispatcher(lease_s=LONG_LEASE_S):
        fleet.workers.start(lease_s=LONG_LEASE_S)
        outcome = assert_exact(fleet, job, places, names=names, reference=reference)

    assert outcome.counts["done"] == len(names)
    assert set(fleet.workers.publish_counts(places).values()) == {1}
    assert fleet.workers.terminate() == [0]


def test_a_job_whose_images_are_done_before_the_listing_ends_stays_open(
    fleet: Fleet, places: Places, reference: Reference, tmp_path: Path
) -> None:
    names = put_images(fleet.store, places, 20)
    before = {job.id for job in fleet.ledger.jobs.newest()}
    fleet.workers.start(lease_s=LONG_LEASE_S)
    freezes = f"after_add_part={tmp_path / 'frozen'}"
    submit = fleet.submissions.start_for(places, test_part_rows="8", test_freezepoints=freezes)
    with fleet.dispatcher(test_part_rows="8", lease_s=LONG_LEASE_S):
        wait_until(lambda: is_stopped(submit), what="the submission is frozen after one of three parts")
        (job,) = {job.id for job in fleet.ledger.jobs.newest()} - before
        wait_until(lambda: fleet.ledger.jobs.get(job).done == 8, what="the listed images are done")
        fleet.wait_for_turns(3)
        assert fleet.ledger.jobs.get(job).closed is None
        os.kill(submit, signal.SIGCONT)

        outcome = assert_exact(fleet, job, places, names=names, reference=reference)

    assert outcome.counts["done"] == 20
    assert set(fleet.workers.publish_counts(places).values()) == {1}


def test_a_source_that_is_replaced_while_it_waits_or_is_worked_on_never_mixes_versions(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, tmp_path: Path
) -> None:
    """Replaced on its queue: it fails with `source_changed`. Replaced after the download: the listed version is
    published with its ETag, and the next job makes the new version."""
    names = put_images(fleet.store, places, 2)
    waiting, in_work = (places.key(name) for name in names)
    listed = source_etag(fleet, in_work)
    job = submit("--lane", "live")
    fleet.store.put(waiting, sample_image(seed=90), content_type="image/jpeg")
    worker = fleet.workers.fork(slots="2", lease_s="60", test_freezepoints=f"after_model={tmp_path / 'frozen'}")
    wait_until(lambda: is_stopped(worker), what="the worker has downloaded and computed the second image")
    fleet.store.put(in_work, sample_image(seed=91), content_type="image/jpeg")
    os.kill(worker, signal.SIGCONT)
    with fleet.dispatcher(lease_s="60"):
        outcome = assert_exact(fleet, job, places, names=names, reference=reference)

        assert outcome.states == {0: "failed", 1: "done"}
        [(_, failure)] = fleet.ledger.images.failures(job)
        assert (failure.code, failure.tries) == ("source_changed", 1)
        assert made_from(fleet, places, names[1]) == listed
        again = submit()
        outcome = assert_exact(fleet, again, places, names=names, reference={})

    assert outcome.counts["done"] == 2
    for name in names:
        assert made_from(fleet, places, name) == source_etag(fleet, places.key(name))
    assert fleet.workers.terminate() == [0]


def source_etag(fleet: Fleet, location: Location) -> str:
    found = fleet.store.head(location, role="source")
    assert found is not None
    return found.etag


def made_from(fleet: Fleet, places: Places, name: str) -> str:
    """Return the ETag of the source version that the cutout is made from."""
    found = fleet.store.head(places.cutout(name), role="output")
    assert found is not None
    return found.metadata["cf-source-etag"]
