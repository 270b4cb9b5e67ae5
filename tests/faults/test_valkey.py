"""Valkey goes away, stops answering or loses connections: workers stay, and everything arrives."""

from __future__ import annotations

import signal
import time

import pytest
import redis

from tests.faults.fleet import IMAGES, Fleet, Reference, Submit
from tests.faults.proxy import Wire
from tests.faults.truth import prove
from tests.support.factories import Places, put_images, wait_until

AWAY_S = 6.0
"""Longer than a lease and than clients wait for an answer."""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("slots", ["2", "16"], ids=["saturated", "with_free_slots"])
def test_started_again_valkey_finds_every_worker_and_no_image_lost(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, slots: str, number: signal.Signals
) -> None:
    """Workers with free slots wait in BRPOP: stock kombu would end them."""
    names = put_images(fleet.store, places, IMAGES)
    worker = fleet.workers.start(slots=slots, test_device_ms="100")
    with fleet.dispatcher():
        job = submit()
        wait_until(lambda: fleet.ledger.job(job).done > 4)
        restart(fleet, number)

        truth = prove(fleet, job, places, names=names, reference=reference)

    assert truth.counts["done"] == IMAGES
    assert fleet.workers.alive() == [worker]
    assert fleet.workers.dismiss() == [0]


def restart(fleet: Fleet, number: signal.Signals) -> None:
    valkey = fleet.stack.valkey
    assert valkey is not None
    valkey.signal(number)
    wait_until(lambda: valkey.poll() is not None)
    valkey.kill()  # closes its log
    fleet.stack.start_valkey()


def test_away_for_longer_than_a_lease_valkey_is_waited_for(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, IMAGES)
    worker = fleet.workers.start(test_device_ms="100")
    with fleet.dispatcher():
        job = submit()
        wait_until(lambda: fleet.ledger.job(job).done > 4)
        valkey = fleet.stack.valkey
        assert valkey is not None
        valkey.kill()
        known = fleet.workers.text().count("redis_unreachable")
        wait_until(lambda: fleet.workers.text().count("redis_unreachable") > known + 4)
        fleet.stack.start_valkey()

        truth = prove(fleet, job, places, names=names, reference=reference)

    assert truth.counts["done"] == IMAGES
    assert fleet.workers.alive() == [worker]
    assert fleet.workers.dismiss() == [0]


@pytest.mark.parametrize("how", ["paused", "frozen", "reset", "half_open", "slow"])
def test_a_valkey_that_can_not_be_heard_for_a_while_costs_only_that(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, how: str
) -> None:
    names = put_images(fleet.store, places, IMAGES)
    with Wire(fleet.stack.redis_port) as wire:
        url = f"redis://127.0.0.1:{wire.port}/0"
        worker = fleet.workers.start(redis_url=url, test_device_ms="100")
        with fleet.dispatcher(redis_url=url):
            job = submit()
            wait_until(lambda: fleet.ledger.job(job).done > 4)
            disturb(fleet, wire, how)
            truth = prove(fleet, job, places, names=names, reference=reference)

        assert truth.counts["done"] == IMAGES
        assert fleet.workers.alive() == [worker]
        assert fleet.workers.dismiss() == [0]


def pass_time(seconds: float) -> None:
    deadline = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() > deadline)


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
