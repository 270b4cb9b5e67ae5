"""Forged messages and jobs in Redis that `CUTFLEET_SOURCES` and `CUTFLEET_DESTINATIONS` do not allow, or that no worker
can read: workers and dispatcher make no request outside the allowlist, fail these images with a code, and finish the
others."""

from __future__ import annotations

import base64
import json

import pytest
import redis

from jobs.message import queue_name
from tests.faults.fleet import Fleet
from tests.faults.invariants import assert_exact
from tests.faults.s3_proxy import S3Proxy
from tests.faults.stand_in_settings import MODEL
from tests.support.images import put_images
from tests.support.places import Places
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("fake_worker")
SOME = 4


def forge(broker: redis.Redis, image: str, **fields: object) -> None:
    """Change fields of the message of `image`, both on its queue and in the ledger."""

    def forged(text: str) -> str:
        message = json.loads(text)
        body = json.loads(base64.b64decode(message["body"]))
        body[1]["task"] |= fields
        return json.dumps(message | {"body": base64.b64encode(json.dumps(body).encode()).decode()})

    queue = queue_name("live", MODEL)
    messages: list[str] = broker.lrange(queue, 0, -1)  # type: ignore[assignment]  # the types cover asyncio too
    for at, text in enumerate(messages):
        if json.loads(text)["headers"]["id"] == image:
            broker.lset(queue, at, forged(text))
    entry, _, text = str(broker.hget("cf:entry", image)).partition("\n")
    broker.hset("cf:entry", image, f"{entry}\n{forged(text)}")


def test_images_outside_the_allowlist_fail_without_a_request_and_the_others_are_done(
    fleet: Fleet, places: Places
) -> None:
    """Messages with forged keys, a job with a forbidden source, and one with a forbidden destination."""
    forbidden, allowed = fleet.create_places(), Places(f"{places.source}ours/", places.to)
    names = put_images(fleet.store, allowed, SOME)
    put_images(fleet.store, forbidden, 1)
    mixed = fleet.submit_in_process(allowed, lane="live")
    from_forbidden = fleet.submit_in_process(Places(forbidden.source, places.to), lane="live")
    to_forbidden = fleet.submit_in_process(Places(allowed.source, forbidden.to), lane="live")
    with redis.Redis(port=fleet.stack.redis_port, decode_responses=True) as broker:
        forge(broker, f"{mixed}:1", key="elsewhere/p00000.jpg")
        forge(broker, f"{mixed}:2", key="ours/../elsewhere/p00000.jpg")

    with S3Proxy(fleet.stack.s3_port) as proxy:
        allowlist = {"s3_endpoint": proxy.url, "sources": allowed.source, "destinations": allowed.to}
        worker = fleet.workers.start(**allowlist)
        with fleet.dispatcher(**allowlist):
            outcome = assert_exact(fleet, mixed, allowed, names=names, reference={}, only_job=False)
            wait_until(
                lambda: fleet.ledger.jobs.get(from_forbidden).closed is not None,
                what="every image of the forbidden source failed",
            )
            wait_until(
                lambda: "output_not_allowed" in fleet.dispatchers.log_text(),
                what="the dispatcher logs that it cannot write the report",
            )
            assert fleet.ledger.jobs.get(to_forbidden).closed is None, (
                "the job stays open until its report can be written"
            )
            fleet.ledger.jobs.cancel(to_forbidden)
            wait_until(
                lambda: fleet.ledger.jobs.get(to_forbidden).closed is not None, what="the cancelled job is closed"
            )
        asked = {bucket for _, bucket in proxy.asked}

    assert outcome.states == {0: "done", 1: "failed", 2: "failed", 3: "done"}
    assert failures(fleet, mixed) == {1: ("bad_message", 1), 2: ("source_not_allowed", 1)}
    assert failures(fleet, from_forbidden) == {0: ("source_not_allowed", 1)}
    assert failures(fleet, to_forbidden) == {index: ("output_not_allowed", 1) for index in range(SOME)}
    assert not asked & {forbidden.source_location.bucket, forbidden.destination.bucket}
    assert fleet.workers.alive() == [worker]
    assert fleet.workers.terminate() == [0]


def test_an_unreadable_message_fails_only_its_image(fleet: Fleet, places: Places) -> None:
    names = put_images(fleet.store, places, SOME)
    job = fleet.submit_in_process(places, lane="live")
    with redis.Redis(port=fleet.stack.redis_port, decode_responses=True) as broker:
        forge(broker, f"{job}:1", size=-5)
        forge(broker, f"{job}:2", key="\ud800")
    fleet.workers.start()

    with fleet.dispatcher():
        outcome = assert_exact(fleet, job, places, names=names, reference={})

    assert outcome.states == {0: "done", 1: "failed", 2: "failed", 3: "done"}
    assert failures(fleet, job) == {1: ("bad_message", 1), 2: ("bad_message", 1)}
    assert fleet.workers.terminate() == [0]


def test_a_backfill_to_a_destination_that_the_dispatcher_may_not_read_is_paused_with_the_reason(
    fleet: Fleet, places: Places
) -> None:
    put_images(fleet.store, places, 1)
    job = fleet.submit_in_process(places, lane="backfill")

    with fleet.dispatcher(destinations="s3://somewhere-else/"):
        wait_until(lambda: fleet.ledger.jobs.get(job).paused is not None, what="the job is paused")
        assert (fleet.ledger.jobs.get(job).paused or "").startswith("output_not_allowed: ")
        fleet.ledger.jobs.cancel(job)
        wait_until(lambda: fleet.ledger.jobs.get(job).closed is not None, what="the cancelled job is closed")

    assert fleet.ledger.jobs.get(job).cancelled_images == 1


def failures(fleet: Fleet, job: str) -> dict[int, tuple[str, int]]:
    """Return code and number of attempts of each failure."""
    return {index: (failure.code, failure.tries) for index, failure in fleet.ledger.images.failures(job)}
