"""A frozen Flower is disconnected by the server and blocks no worker; Flower stops even when the server is silent."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator

import pytest
import redis

from producer.demo.local_stack import Process, inherited_environment
from tests.faults.fleet import IMAGES, Fleet, Reference, Submit
from tests.faults.invariants import assert_exact
from tests.faults.wire import Wire
from tests.support.flower import Flower
from tests.support.images import put_images
from tests.support.places import Places
from tests.support.waiting import wait_until

LIMIT = "pubsub 262144 262144 0"
"""Bytes that may wait for one subscriber: a thousandth of the limit in `infra`, so that it is reached in seconds."""


@pytest.fixture
def flower(fleet: Fleet) -> Iterator[Process]:
    command = [sys.executable, "-m", "producer.flower", "--address=127.0.0.1", "--port=0"]
    env = inherited_environment() | fleet.stack.environment | {"FLOWER_BASIC_AUTH": "night:shift"}
    flower = Process(command, log=fleet.stack.folder / "logs" / "flower.log", env=env)
    yield flower
    flower.kill()


def test_only_a_frozen_flower_is_disconnected_and_workers_continue(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, flower: Process
) -> None:
    names = put_images(fleet.store, places, IMAGES)
    fleet.workers.start()
    with redis.Redis(port=fleet.stack.redis_port) as broker, fleet.dispatcher():
        broker.config_set("client-output-buffer-limit", LIMIT)
        wait_until(lambda: count_subscribers(broker) == 2, what=f"Flower is subscribed: {flower.log_tail()}")
        channel, event = read_event(broker)
        flower.signal(signal.SIGSTOP)
        before = count_disconnected(broker)

        def is_disconnected() -> bool:
            """Publish events of thousands of images."""
            with broker.pipeline(transaction=False) as pipe:
                for _ in range(500):
                    pipe.publish(channel, event)
                pipe.execute()
            return count_disconnected(broker) > before

        wait_until(is_disconnected, what="the server disconnects Flower")
        job = submit()
        outcome = assert_exact(fleet, job, places, names=names, reference=reference)
        flower.signal(signal.SIGCONT)
        wait_until(lambda: count_subscribers(broker) == 2, what=f"Flower is subscribed again: {flower.log_tail()}")
        assert count_disconnected(broker) == before + 1, "only Flower is disconnected"

    assert outcome.counts["done"] == IMAGES
    assert fleet.workers.terminate() == [0]


def test_on_sigterm_flower_does_not_wait_for_a_silent_server(fleet: Fleet) -> None:
    with Wire(fleet.stack.redis_port) as wire:
        flower = Flower(fleet.stack, more={"CUTFLEET_REDIS_URL": f"redis://127.0.0.1:{wire.port}/0"})
        wait_until(flower.is_up, what="Flower answers")
        wire.swallow()
        with pytest.raises(TimeoutError):
            flower.ask("/api/workers?refresh=1", timeout_s=2)

        flower.process.signal(signal.SIGTERM)
        try:
            wait_until(lambda: flower.process.poll() is not None, within_s=25, what="Flower has ended")
        finally:
            code = flower.process.stop(timeout_s=1)

    assert code == 0


def count_subscribers(broker: redis.Redis) -> int:
    """Return how many clients subscribe to events or remote control: each worker, and Flower."""
    return sum(int(found["psub"]) > 0 for found in broker.client_list())


def count_disconnected(broker: redis.Redis) -> int:
    """Return how many clients the server has disconnected because they were too slow."""
    return int(broker.info("stats")["client_output_buffer_limit_disconnections"])


def read_event(broker: redis.Redis) -> tuple[bytes, bytes]:
    """Return channel and message of one event of a worker."""
    with broker.pubsub(ignore_subscribe_messages=True) as subscription:  # type: ignore[no-untyped-call]
        subscription.psubscribe("/0.celeryev/*")
        found: list[dict[str, bytes]] = []

        def has_event() -> bool:
            found.extend(filter(None, [subscription.get_message(timeout=0.1)]))
            return bool(found)

        wait_until(has_event, what="a worker sends an event")
    return found[0]["channel"], found[0]["data"]
