"""Celery events, which Flower shows: none is lost although workers send them in batches."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jobs.broker import make_app
from jobs.s3.client import Store
from producer.demo.local_stack import LocalStack
from tests.support.environment import Run
from tests.support.images import put_images
from tests.support.places import Places
from tests.support.waiting import wait_until

STEPS = ("task-received", "task-started", "task-succeeded")


def test_each_image_sends_each_event_once(fleet: LocalStack, cutfleet: Run, store: Store, places: Places) -> None:
    names = put_images(store, places, 6)

    with _captured(fleet) as events:
        ran = cutfleet("submit", places.source, "--to", places.to, "--wait")
        job = ran.stdout.strip()
        wait_until(lambda: _count_events(events, job)["task-succeeded"] == len(names), what="the last event arrives")

    assert ran.returncode == 0, ran.stderr
    assert _count_events(events, job) == dict.fromkeys(STEPS, len(names))


def _count_events(events: list[Mapping[str, Any]], job: str) -> Counter[str]:
    return Counter(event["type"] for event in list(events) if str(event.get("uuid", "")).startswith(f"{job}:"))


@contextmanager
def _captured(stack: LocalStack) -> Iterator[list[Mapping[str, Any]]]:
    """Capture events as Flower does; the block begins once the first event has arrived."""
    app = make_app(stack.environment["CUTFLEET_REDIS_URL"])
    events: list[Mapping[str, Any]] = []
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(connection, handlers={"*": events.append})
        thread = threading.Thread(target=receiver.capture, kwargs={"wakeup": False})
        thread.start()
        wait_until(lambda: any(event["type"] == "worker-heartbeat" for event in events), what="a heartbeat arrives")
        yield events
        receiver.should_stop = True
        thread.join()
    app.close()
