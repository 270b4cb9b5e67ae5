"""A message that is unacknowledged for longer than the visibility timeout is delivered only once."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import redis

from tests.faults.broker import has_redelivered_message
from tests.faults.fleet import Fleet, Reference, Submit
from tests.faults.invariants import assert_exact
from tests.faults.proc import is_stopped
from tests.faults.processes import LONG_LEASE_S
from tests.faults.stand_in_settings import VISIBILITY_S
from tests.support.images import put_images
from tests.support.places import Places
from tests.support.waiting import wait_until

LONGER_S = 1.5 * VISIBILITY_S
"""Visibility timeout that outlasts a short suspension of the whole machine."""


@pytest.mark.usefixtures("fake_worker")
def test_an_image_that_takes_longer_than_the_visibility_timeout_is_delivered_once(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    """kombu does not renew messages: `workers.process.kombu_patches.VisibilityLease` does."""
    names = put_images(fleet.store, places, 1)
    long = {"test_visibility_s": str(LONGER_S), "test_device_ms": str(3000 * LONGER_S), "lease_s": LONG_LEASE_S}
    for _ in range(2):  # the second would take a redelivered message
        fleet.workers.fork(slots="1", **long)  # not `start`: both warm up at the same time
    with (
        redis.Redis(port=fleet.stack.redis_port, decode_responses=True) as broker,
        fleet.dispatcher(lease_s=LONG_LEASE_S),
    ):
        job = submit()
        wait_until(lambda: broker.hlen("unacked") == 1, what="a worker has the message")
        taken = time.monotonic()

        wait_until(lambda: is_final(fleet, job, broker), what="the image is done")
        unacknowledged_s = time.monotonic() - taken

        assert_exact(fleet, job, places, names=names, reference=reference)
    assert f"refused {job}:0 busy" not in fleet.workers.log_text()
    assert unacknowledged_s > 2 * LONGER_S, "the image took too little time for this test"
    assert fleet.workers.terminate() == [0, 0]


def test_control_a_message_that_is_not_renewed_is_delivered_again_and_not_claimed_again(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, 1)
    for _ in range(2):
        fleet.workers.start(
            slots="1", test_device_ms=str(3000 * VISIBILITY_S), test_unrenewed="1", lease_s=LONG_LEASE_S
        )
    with fleet.dispatcher(lease_s=LONG_LEASE_S):
        job = submit()
        wait_until(lambda: f"refused {job}:0 busy" in fleet.workers.log_text(), what="the message is delivered again")

        assert_exact(fleet, job, places, names=names, reference=reference)
    assert sum(fleet.workers.claim_counts(job).values()) == 1
    assert fleet.workers.terminate() == [0, 0]


def test_a_worker_that_dies_while_it_restores_messages_does_not_keep_others_from_restoring_them(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, tmp_path: Path
) -> None:
    """It dies with kombu's lock on restoring."""
    names = put_images(fleet.store, places, 4)
    first = fleet.workers.start(test_freezepoints=f"after_fetch={tmp_path / 'frozen'}")
    with redis.Redis(port=fleet.stack.redis_port) as broker, fleet.dispatcher():
        job = submit()
        wait_until(lambda: is_stopped(first))
        fleet.workers.kill(first)
        assert broker.hlen("unacked") > 0
        second = fleet.workers.start(test_failpoints=f"giving_back={tmp_path / 'killed'}")
        assert fleet.workers.wait_for(second) == -signal.SIGKILL
        assert (tmp_path / "killed").exists(), "it died with the lock"
        fleet.workers.start()

        outcome = assert_exact(fleet, job, places, names=names, reference=reference)

    assert outcome.counts["done"] == len(names)
    assert fleet.workers.terminate() == [0]


def is_final(fleet: Fleet, job: str, broker: redis.Redis) -> bool:
    assert not has_redelivered_message(broker), "the message was delivered again while its worker had it"
    return fleet.ledger.jobs.get(job).done == 1
