"""Messages come twice, or nobody is there to take them, or what they speak of is another image by now."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import redis

from jobs.broker import lane_queue
from tests.faults.fleet import UNHURRIED_S, Fleet, Reference, Submit, is_stopped
from tests.faults.terms import MODEL
from tests.faults.truth import prove
from tests.support.factories import Places, put_images, sample_image, wait_until

pytestmark = pytest.mark.usefixtures("asleep")
LIVE, BACKFILL = (lane_queue(lane, MODEL) for lane in ("live", "backfill"))
LEASES = 60
"""Of a minute each, as they are by default."""


def test_of_a_hundred_images_whose_messages_come_twice_each_is_worked_on_once(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, 100)
    job = submit("--lane", "live")
    with redis.Redis(port=fleet.stack.redis_port, decode_responses=True) as broker:
        double(broker, LIVE)
        assert broker.llen(LIVE) == 200
    for _ in range(2):
        fleet.workers.start(slots="8", ready=False, lease_s=UNHURRIED_S)
    with fleet.dispatcher(lease_s=UNHURRIED_S):
        truth = prove(fleet, job, places, names=names, reference=reference)

    assert truth.counts["done"] == 100
    assert sorted(fleet.workers.begun(job).values()) == [1] * 100
    assert sorted(fleet.workers.published(places).values()) == [1] * 100
    assert fleet.workers.dismiss() == [0, 0]


def double(broker: redis.Redis, queue: str) -> None:
    """Each message has another beside it, as a delivery of its own."""
    messages: list[str] = broker.lrange(queue, 0, -1)  # type: ignore[assignment]  # the types cover asyncio too
    both = []
    for message in messages:
        again = json.loads(message)
        again["properties"]["delivery_tag"] += "-again"
        both += [message, json.dumps(again)]
    with broker.pipeline() as pipe:
        pipe.delete(queue)
        pipe.rpush(queue, *both)
        pipe.execute()


def test_without_a_worker_for_an_hour_of_leases_the_queue_does_not_grow(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, 16)
    with fleet.dispatcher(test_pause_s="0.02"), redis.Redis(port=fleet.stack.redis_port) as broker:
        job = submit()
        wait_until(lambda: broker.zcard("cf:waiting") == len(names))
        for _ in range(LEASES):
            broker.zadd("cf:waiting", dict.fromkeys(broker.zrange("cf:waiting", 0, -1), 0), xx=True)
            wait_until(lambda: broker.zcount("cf:waiting", 0, 0) == 0, what="the dispatcher has looked after them")
            assert broker.llen(BACKFILL) == len(names)
        fleet.ledger.tune(job, lane="live")
        for _ in range(3):
            broker.zadd("cf:waiting", dict.fromkeys(broker.zrange("cf:waiting", 0, -1), 0), xx=True)
            wait_until(lambda: broker.zcount("cf:waiting", 0, 0) == 0, what="the dispatcher has looked after them")
            assert broker.llen(BACKFILL) == len(names), "what was tuned stays on its old queue"
    with fleet.dispatcher(lease_s=UNHURRIED_S):
        fleet.workers.start(lease_s=UNHURRIED_S)
        truth = prove(fleet, job, places, names=names, reference=reference)

    assert truth.counts["done"] == len(names)
    assert set(fleet.workers.published(places).values()) == {1}
    assert fleet.workers.dismiss() == [0]


def test_a_job_whose_images_are_done_faster_than_they_are_listed_stays_open_for_the_rest(
    fleet: Fleet, places: Places, reference: Reference, tmp_path: Path
) -> None:
    names = put_images(fleet.store, places, 20)
    before = {job.id for job in fleet.ledger.jobs()}
    fleet.workers.start(lease_s=UNHURRIED_S)
    freezes = f"after_add_part={tmp_path / 'frozen'}"
    submit = fleet.submits.start_for(places, test_part_rows="8", test_freezepoints=freezes)
    with fleet.dispatcher(test_part_rows="8", lease_s=UNHURRIED_S):
        wait_until(lambda: is_stopped(submit), what="one part of three is listed")
        (job,) = {job.id for job in fleet.ledger.jobs()} - before
        wait_until(lambda: fleet.ledger.job(job).done == 8, what="what is listed is done")
        fleet.let_dispatcher_turn(3)
        assert fleet.ledger.job(job).closed is None
        os.kill(submit, signal.SIGCONT)

        truth = prove(fleet, job, places, names=names, reference=reference)

    assert truth.counts["done"] == 20
    assert set(fleet.workers.published(places).values()) == {1}


def test_a_source_that_is_replaced_while_it_waits_or_is_worked_on_is_never_mixed(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, tmp_path: Path
) -> None:
    """On its queue: it fails with its code. Fetched already: what is published is the version that was listed, and says
    so, and the next job makes the new one."""
    names = put_images(fleet.store, places, 2)
    waits, works = (places.key(name) for name in names)
    listed = fleet.store.head(works, role="source")
    job = submit("--lane", "live")
    fleet.store.put(waits, sample_image(seed=90), content_type="image/jpeg")
    worker = fleet.workers.start(
        slots="2", lease_s="60", test_freezepoints=f"after_model={tmp_path / 'frozen'}", ready=False
    )
    wait_until(lambda: is_stopped(worker), what="it has fetched and computed the other one")
    fleet.store.put(works, sample_image(seed=91), content_type="image/jpeg")
    os.kill(worker, signal.SIGCONT)
    with fleet.dispatcher(lease_s="60"):
        truth = prove(fleet, job, places, names=names, reference=reference)

        assert truth.states == {0: "failed", 1: "done"}
        [(_, failure)] = fleet.ledger.failures(job)
        assert (failure.code, failure.tries) == ("source_changed", 1)
        assert made_of(fleet, places, names[1]) == listed.etag
        again = submit()
        truth = prove(fleet, again, places, names=names, reference={})

    assert truth.counts["done"] == 2
    for name in names:
        assert made_of(fleet, places, name) == fleet.store.head(places.key(name), role="source").etag
    assert fleet.workers.dismiss() == [0]


def made_of(fleet: Fleet, places: Places, name: str) -> str:
    """ETag of the source's version that the cutout is of."""
    found = fleet.store.head(places.cutout(name), role="output")
    assert found is not None
    return found.metadata["cf-source-etag"]
