"""A message that its worker holds for longer than the broker's visibility timeout is not delivered a second time."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import redis

from tests.faults.fleet import UNHURRIED_S, Fleet, Reference, Submit, came_back, is_stopped
from tests.faults.terms import VISIBILITY_S
from tests.faults.truth import prove
from tests.support.factories import Places, put_images, wait_until

LONGER_S = 1.5 * VISIBILITY_S
"""Where a message must not come back though its worker stands still for some seconds."""


@pytest.mark.usefixtures("asleep")
def test_an_image_that_takes_longer_than_the_visibility_timeout_is_delivered_once(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    """kombu itself renews nothing: `workers.process.kombu_patches.VisibilityLease` does."""
    names = put_images(fleet.store, places, 1)
    long = {"test_visibility_s": str(LONGER_S), "test_device_ms": str(3000 * LONGER_S), "lease_s": UNHURRIED_S}
    for _ in range(2):  # one more than is needed, so that a message that came back would find a worker
        fleet.workers.start(slots="1", ready=False, **long)  # each has its device warm up
    with (
        redis.Redis(port=fleet.stack.redis_port, decode_responses=True) as broker,
        fleet.dispatcher(lease_s=UNHURRIED_S),
    ):
        job = submit()
        wait_until(lambda: broker.hlen("unacked") == 1, what="a worker holds the message")
        began = time.monotonic()

        wait_until(lambda: is_final(fleet, job, broker), what="the image is done, its message delivered once")
        held_s = time.monotonic() - began

        prove(fleet, job, places, names=names, reference=reference)
    assert f"refused {job}:0 busy" not in fleet.workers.text()
    assert held_s > 2 * LONGER_S, "it was not held for long enough to show anything"
    assert fleet.workers.dismiss() == [0, 0]


def test_control_a_message_that_nobody_renews_is_delivered_again_and_the_ledger_drops_it(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, 1)
    for _ in range(2):
        fleet.workers.start(slots="1", test_device_ms=str(3000 * VISIBILITY_S), test_unrenewed="1", lease_s=UNHURRIED_S)
    with fleet.dispatcher(lease_s=UNHURRIED_S):
        job = submit()
        wait_until(lambda: f"refused {job}:0 busy" in fleet.workers.text(), what="it is delivered a second time")

        prove(fleet, job, places, names=names, reference=reference)
    assert sum(fleet.workers.begun(job).values()) == 1
    assert fleet.workers.dismiss() == [0, 0]


def test_a_worker_that_dies_while_it_gives_back_a_dead_ones_messages_keeps_nobody_from_it(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, tmp_path: Path
) -> None:
    """It dies holding kombu's lock of that."""
    names = put_images(fleet.store, places, 4)
    first = fleet.workers.start(test_freezepoints=f"after_fetch={tmp_path / 'frozen'}")
    with redis.Redis(port=fleet.stack.redis_port) as broker, fleet.dispatcher():
        job = submit()
        wait_until(lambda: is_stopped(first))
        fleet.workers.kill(first)
        assert broker.hlen("unacked") > 0
        second = fleet.workers.start(test_failpoints=f"giving_back={tmp_path / 'killed'}")
        assert fleet.workers.wait_for(second) == -signal.SIGKILL
        assert (tmp_path / "killed").exists(), "the lock is its own for some seconds more"
        fleet.workers.start()

        truth = prove(fleet, job, places, names=names, reference=reference)

    assert truth.counts["done"] == len(names)
    assert fleet.workers.dismiss() == [0]


def is_final(fleet: Fleet, job: str, broker: redis.Redis) -> bool:
    assert not came_back(broker), "the message came back while its worker held it"
    return fleet.ledger.job(job).done == 1
