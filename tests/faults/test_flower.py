"""Flower is frozen: the server cuts it off alone, and no worker waits for it. The server is silent: Flower goes."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator

import pytest
import redis

from producer.demo.local_stack import Process, inherited_environment
from tests.faults.fleet import IMAGES, Fleet, Reference, Submit
from tests.faults.proxy import Wire
from tests.faults.truth import prove
from tests.support.factories import Places, put_images, wait_until
from tests.support.flower import Flower

LIMIT = "pubsub 262144 262144 0"
"""Bytes that wait for one subscriber: a thousandth of what `infra` has, so that seconds are as good as hours."""


@pytest.fixture
def flower(fleet: Fleet) -> Iterator[Process]:
    command = [sys.executable, "-m", "producer.flower", "--address=127.0.0.1", "--port=0"]
    env = inherited_environment() | fleet.stack.environment | {"FLOWER_BASIC_AUTH": "night:shift"}
    flower = Process(command, log=fleet.stack.folder / "logs" / "flower.log", env=env)
    yield flower
    flower.kill()


def test_a_frozen_flower_is_cut_off_alone_while_the_workers_go_on(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, flower: Process
) -> None:
    names = put_images(fleet.store, places, IMAGES)
    fleet.workers.start()
    with redis.Redis(port=fleet.stack.redis_port) as broker, fleet.dispatcher():
        broker.config_set("client-output-buffer-limit", LIMIT)
        wait_until(lambda: listeners(broker) == 2, what=f"Flower listens: {flower.last_words()}")
        channel, event = an_event(broker)
        flower.signal(signal.SIGSTOP)
        known = cut_off(broker)

        def floods() -> bool:
            """Events as of thousands of images."""
            with broker.pipeline(transaction=False) as pipe:
                for _ in range(500):
                    pipe.publish(channel, event)
                pipe.execute()
            return cut_off(broker) > known

        wait_until(floods, what="the server cuts Flower off")
        job = submit()
        truth = prove(fleet, job, places, names=names, reference=reference)
        flower.signal(signal.SIGCONT)
        wait_until(lambda: listeners(broker) == 2, what=f"Flower is back: {flower.last_words()}")
        assert cut_off(broker) == known + 1, "nobody else was"

    assert truth.counts["done"] == IMAGES
    assert fleet.workers.dismiss() == [0]


def test_told_to_go_it_does_not_wait_for_a_server_that_says_nothing(fleet: Fleet) -> None:
    with Wire(fleet.stack.redis_port) as wire:
        flower = Flower(fleet.stack, more={"CUTFLEET_REDIS_URL": f"redis://127.0.0.1:{wire.port}/0"})
        wait_until(flower.is_up, what="Flower answers")
        wire.swallow()
        with pytest.raises(TimeoutError):
            flower.ask("/api/workers?refresh=1", timeout_s=2)

        flower.process.signal(signal.SIGTERM)
        try:
            wait_until(lambda: flower.process.poll() is not None, within_s=25, what="Flower goes")
        finally:
            code = flower.process.stop(timeout_s=1)

    assert code == 0


def listeners(broker: redis.Redis) -> int:
    """Clients that hear events or orders: each worker, and Flower."""
    return sum(int(found["psub"]) > 0 for found in broker.client_list())


def cut_off(broker: redis.Redis) -> int:
    """Clients that were too slow for the server."""
    return int(broker.info("stats")["client_output_buffer_limit_disconnections"])


def an_event(broker: redis.Redis) -> tuple[bytes, bytes]:
    """One of a worker's, as it is sent: channel and message."""
    with broker.pubsub(ignore_subscribe_messages=True) as heard:
        heard.psubscribe("/0.celeryev/*")
        found: list[dict[str, bytes]] = []

        def is_heard() -> bool:
            found.extend(filter(None, [heard.get_message(timeout=0.1)]))
            return bool(found)

        wait_until(is_heard, what="a worker says something")
    return found[0]["channel"], found[0]["data"]
