"""Valkey is away, stops answering or loses connections: workers keep running, and no image is lost."""

from __future__ import annotations

import signal
import time

import pytest
import redis

from tests.faults.fleet import IMAGES, Fleet, Reference, Submit
from tests.faults.invariants import assert_exact
from tests.faults.wire import Wire
from tests.support.images import put_images
from tests.support.places import Places
from tests.support.waiting import wait_until

AWAY_S = 6.0
"""Longer than a lease and than the timeout of clients."""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("slots", ["2", "16"], ids=["saturated", "with_free_slots"])
def test_a_restart_of_valkey_ends_no_worker_and_loses_no_image(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, slots: str, number: signal.Signals
) -> None:
    """Workers with free slots wait in BRPOP, where unpatched kombu would end them."""
    names = put_images(fleet.store, places, IMAGES)
    worker = fleet.workers.start(slots=slots, test_device_ms="100")
    with fleet.dispatcher():
        job = submit()
        wait_until(lambda: fleet.ledger.jobs.get(job).done > 4)
        restart(fleet, number)

        outcome = assert_exact(fleet, job, places, names=names, reference=reference)

    assert outcome.counts["done"] == IMAGES
    assert fleet.workers.alive() == [worker]
    assert fleet.workers.terminate() == [0]


def restart(fleet: Fleet, number: signal.Signals) -> None:
    valkey = fleet.stack.valkey
    assert valkey is not None
    valkey.signal(number)
    wait_until(lambda: valkey.poll() is not None, what="Valkey has ended")
    valkey.kill()  # closes its log
    fleet.stack.start_valkey()


def test_workers_wait_for_a_valkey_that_is_away_longer_than_a_lease(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, IMAGES)
    worker = fleet.workers.start(test_device_ms="100")
    with fleet.dispatcher():
        job = submit()
        wait_until(lambda: fleet.ledger.jobs.get(job).done > 4)
        valkey = fleet.stack.valkey
        assert valkey is not None
        valkey.kill()
        earlier = fleet.workers.log_text().count("redis_unreachable")
        wait_until(lambda: fleet.workers.log_text().count("redis_unreachable") > earlier + 4, what="the worker logs it")
        fleet.stack.start_valkey()

        outcome = assert_exact(fleet, job, places, names=names, reference=reference)

    assert outcome.counts["done"] == IMAGES
    assert fleet.workers.alive() == [worker]
    assert fleet.workers.terminate() == [0]


@pytest.mark.parametrize("how", ["paused", "frozen", "reset", "half_open", "slow"])
def test_a_valkey_that_does_not_answer_for_a_while_loses_no_image(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, how: str
) -> None:
    names = put_images(fleet.store, places, IMAGES)
    with Wire(fleet.stack.redis_port) as wire:
        url = f"redis://127.0.0.1:{wire.port}/0"
        worker = fleet.workers.start(redis_url=url, test_device_ms="100")
        with fleet.dispatcher(redis_url=url):
            job = submit()
            wait_until(lambda: fleet.ledger.jobs.get(job).done > 4)
            disturb(fleet, wire, how)
            outcome = assert_exact(fleet, job, places, names=names, reference=reference)

        assert outcome.counts["done"] == IMAGES
        assert fleet.workers.alive() == [worker]
        assert fleet.workers.terminate() == [0]


def pass_time(seconds: float) -> None:
    deadline = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() > deadline, within_s=seconds + 60)


def disturb(fleet: Fleet, wire: Wire, how: str) -> None:
    with redis.Redis(port=fleet.stack.redis_port, socket_timeout=30) as client:
        if how == "paused":
            client.client_pause(int(AWAY_S * 1000))
        elif how == "frozen":
            assert fleet.stack.valkey is not None
            fleet.stack.valkey.signal(signal.SIGSTOP)
            pass_time(AWAY_S)
            fleet.stack.valkey.signal(signal.SIGCONT)
        elif how == "reset":
            for _ in range(3):
                wait_until(lambda: wire.cut() > 0, what="there is a connection to cut")
                pass_time(1)
        elif how == "half_open":
            wire.swallow()
            pass_time(AWAY_S)
            wire.heal()
        else:
            wire.delay_s = 0.05
