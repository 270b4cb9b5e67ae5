"""Somebody who may write to Redis asks for what `CUTFLEET_SOURCES` and `CUTFLEET_DESTINATIONS` do not allow: workers
and dispatcher touch nothing of it, say so by a code, and go on with the rest."""

from __future__ import annotations

import base64
import json

import pytest
import redis

from jobs.broker import lane_queue
from jobs.s3.client import Location
from tests.faults.fleet import Fleet, make_places, submit_here
from tests.faults.proxy import S3Proxy
from tests.faults.terms import MODEL
from tests.faults.truth import prove
from tests.support.factories import Places, put_images, wait_until

pytestmark = pytest.mark.usefixtures("asleep")
SOME = 4


def forge(broker: redis.Redis, image: str, **fields: object) -> None:
    """The message of `image`, on its queue and kept, says something else."""

    def forged(text: str) -> str:
        message = json.loads(text)
        body = json.loads(base64.b64decode(message["body"]))
        body[1]["task"] |= fields
        return json.dumps(message | {"body": base64.b64encode(json.dumps(body).encode()).decode()})

    queue = lane_queue("live", MODEL)
    for at, text in enumerate(broker.lrange(queue, 0, -1)):
        if json.loads(text)["headers"]["id"] == image:
            broker.lset(queue, at, forged(text))
    kept, _, text = str(broker.hget("cf:entry", image)).partition("\n")
    broker.hset("cf:entry", image, f"{kept}\n{forged(text)}")


def test_what_is_not_allowed_fails_by_its_code_untouched_and_its_neighbours_are_done(
    fleet: Fleet, places: Places
) -> None:
    """Messages with foreign keys, a job with a foreign source, and one with a foreign destination."""
    theirs, ours = make_places(fleet), Places(f"{places.source}ours/", places.to)
    names = put_images(fleet.store, ours, SOME)
    put_images(fleet.store, theirs, 1)
    mixed = submit_here(fleet, ours, lane="live")
    from_theirs = submit_here(fleet, Places(theirs.source, places.to), lane="live")
    to_theirs = submit_here(fleet, Places(ours.source, theirs.to), lane="live")
    with redis.Redis(port=fleet.stack.redis_port, decode_responses=True) as broker:
        forge(broker, f"{mixed}:1", key="elsewhere/p00000.jpg")
        forge(broker, f"{mixed}:2", key="ours/../elsewhere/p00000.jpg")

    with S3Proxy(fleet.stack.s3_port) as proxy:
        bounds = {"s3_endpoint": proxy.url, "sources": ours.source, "destinations": ours.to}
        worker = fleet.workers.start(**bounds)
        with fleet.dispatcher(**bounds):
            truth = prove(fleet, mixed, ours, names=names, reference={}, alone=False)
            wait_until(lambda: fleet.ledger.job(from_theirs).closed is not None, what="all of it failed")
            wait_until(lambda: "output_not_allowed" in fleet.dispatchers.text(), what="no report is written there")
            assert fleet.ledger.job(to_theirs).closed is None, "its report is written once that is allowed"
            fleet.ledger.cancel(to_theirs)
            wait_until(lambda: fleet.ledger.job(to_theirs).closed is not None, what="cancelled, it is closed")
        asked = {bucket for _, bucket in proxy.asked}

    assert truth.states == {0: "done", 1: "failed", 2: "failed", 3: "done"}
    assert why(fleet, mixed) == {1: ("bad_message", 1), 2: ("source_not_allowed", 1)}
    assert why(fleet, from_theirs) == {0: ("source_not_allowed", 1)}
    assert why(fleet, to_theirs) == {index: ("output_not_allowed", 1) for index in range(SOME)}
    assert not asked & {Location.parse(theirs.source).bucket, Location.parse(theirs.to).bucket}
    assert fleet.workers.alive() == [worker]
    assert fleet.workers.dismiss() == [0]


def test_a_message_that_no_worker_can_read_fails_its_image_and_no_other(fleet: Fleet, places: Places) -> None:
    names = put_images(fleet.store, places, SOME)
    job = submit_here(fleet, places, lane="live")
    with redis.Redis(port=fleet.stack.redis_port, decode_responses=True) as broker:
        forge(broker, f"{job}:1", size=-5)
        forge(broker, f"{job}:2", key="\ud800")
    fleet.workers.start()

    with fleet.dispatcher():
        truth = prove(fleet, job, places, names=names, reference={})

    assert truth.states == {0: "done", 1: "failed", 2: "failed", 3: "done"}
    assert why(fleet, job) == {1: ("bad_message", 1), 2: ("bad_message", 1)}
    assert fleet.workers.dismiss() == [0]


def test_a_backfill_to_where_the_dispatcher_may_not_read_is_paused_and_says_why(fleet: Fleet, places: Places) -> None:
    put_images(fleet.store, places, 1)
    job = submit_here(fleet, places, lane="backfill")

    with fleet.dispatcher(destinations="s3://somewhere-else/"):
        wait_until(lambda: fleet.ledger.job(job).paused is not None, what="it is paused")
        assert fleet.ledger.job(job).paused.startswith("output_not_allowed: ")
        fleet.ledger.cancel(job)
        wait_until(lambda: fleet.ledger.job(job).closed is not None, what="cancelled, it is closed")

    assert fleet.ledger.job(job).cancelled_images == 1


def why(fleet: Fleet, job: str) -> dict[int, tuple[str, int]]:
    """Code and tries of each failure."""
    return {index: (failure.code, failure.tries) for index, failure in fleet.ledger.failures(job)}
