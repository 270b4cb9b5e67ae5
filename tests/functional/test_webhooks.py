"""Webhooks, with a real ledger, store and receiver. The library that receivers use checks the signatures."""

from __future__ import annotations

import collections
import concurrent.futures
import hashlib
import logging
import socket
import threading
import time
from collections.abc import Callable

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from jobs.errors import SettingsError
from jobs.job import ImageState, Job
from jobs.ledger import Ledger
from jobs.s3.client import Store
from jobs.settings import Settings
from producer.demo.local_stack import LocalStack
from producer.dispatcher.dispatcher import Dispatcher
from producer.records import failures
from producer.webhooks.delivery import Deliverer, Payload, check_webhook, delivering, replay
from tests.support.environment import Run, own_redis_url
from tests.support.places import Places
from tests.support.submissions import submit_keys
from tests.support.waiting import wait_until
from tests.support.webhook_receiver import WEBHOOK_SECRET, Receiver
from tests.support.work import finish_image, is_closed, step_until

OLD_SECRET = "whsec_YWJjZGVmZ2hpamFiY2RlZmdoaWphYmNkZWZnaGlqYWI="  # noqa: S105
SETTINGS = Settings(webhook_secret=WEBHOOK_SECRET, webhook_private=True, retry_base_s=0.01)
MAX_EVENTS_PER_RECEIVER, MAX_EVENTS = 20_000, 100_000
"""Limits in the ledger's scripts."""

Deliver = Callable[[], object]


@pytest.fixture
def deliver(own_ledger: Ledger, store: Store) -> Deliver:
    """Deliver what is due, once, and wait for the end of the deliveries."""
    deliverer = Deliverer(own_ledger, store, SETTINGS)

    def deliver_once() -> None:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            deliverer.step(pool)

    return deliver_once


def submit_live(
    places: Places, ledger: Ledger, store: Store, webhook: str, *, images: bool = False, count: int = 1
) -> Job:
    keys = tuple(f"{number} é.jpg" for number in range(count))
    return submit_keys(places, ledger, store, lane="live", keys=keys, webhook=webhook, webhook_images=images)


def finish(job: Job, index: int, ledger: Ledger, state: ImageState = ImageState.DONE) -> None:
    finish_image(job, index, ledger, state, key=f"{index} é.jpg", code="not_an_image")


def dispatch_until(is_so: Callable[[], bool], ledger: Ledger, store: Store, *, what: str) -> None:
    dispatcher = Dispatcher(ledger, store, SETTINGS)
    step_until(dispatcher, is_so, what=what)
    dispatcher.close()


def close(job: Job, ledger: Ledger, store: Store) -> Job:
    dispatch_until(lambda: is_closed(job, ledger), ledger, store, what="the job is closed")
    return ledger.jobs.get(job.id)


def replay_failures(job: Job, ledger: Ledger, store: Store) -> None:
    """Put failed images on their queue again."""
    assert failures.replay(job, None, ledger=ledger, store=store)
    dispatch_until(lambda: not ledger.jobs.get(job.id).reopened, ledger, store, what="they are fed once more")


def fill_outbox(receiver: Receiver, count: int, ledger: Ledger) -> str:
    """Let `count` events of forgotten jobs wait for the receiver; return the key of its outbox."""
    key = f"cf:outbox:{hashlib.sha1(receiver.url.encode(), usedforsecurity=False).hexdigest()}"
    ledger.connection.call("zadd", key, {f"gone:{number}": time.time() + 3600 for number in range(count)})
    return key


def received_ids(receiver: Receiver) -> list[str]:
    return [headers["webhook-id"] for headers, _ in receiver.received]


def test_a_receiver_that_fails_twice_gets_the_event_a_third_time_signed(
    places: Places, store: Store, own_ledger: Ledger, receiver: Receiver, deliver: Deliver
) -> None:
    receiver.statuses = [500, 503]
    job = submit_live(places, own_ledger, store, receiver.url)
    finish(job, 0, own_ledger)
    job = close(job, own_ledger, store)

    wait_until(lambda: deliver() or len(receiver.received) == 3, within_s=20, what="three deliveries")
    deliver()

    events = receiver.events()
    assert [event["type"] for event in events] == ["job.closed"] * 3
    assert events[2]["data"]["job"] == job.id
    assert (events[2]["data"]["done"], events[2]["data"]["state"]) == (1, "closed")
    assert len(set(received_ids(receiver))) == 1, "one event, one id"
    headers, body = receiver.received[2]
    with pytest.raises(WebhookVerificationError):
        Webhook(WEBHOOK_SECRET).verify(body.replace('"done": 1', '"done": 2'), dict(headers))
    with pytest.raises(WebhookVerificationError):
        Webhook(WEBHOOK_SECRET).verify(body, dict(headers) | {"webhook-timestamp": "1"})


def test_each_final_image_has_an_event_with_its_state(
    places: Places, store: Store, own_ledger: Ledger, receiver: Receiver, deliver: Deliver
) -> None:
    job = submit_live(places, own_ledger, store, receiver.url, images=True, count=4)
    finish(job, 0, own_ledger)
    finish(job, 1, own_ledger, ImageState.REVIEW)
    deliver()
    finish(job, 2, own_ledger, ImageState.SKIPPED)
    finish(job, 3, own_ledger, ImageState.FAILED)
    close(job, own_ledger, store)  # moves its rows from the ledger to S3
    deliver()

    events = {event["data"].get("index"): event for event in receiver.events()}
    assert {index: event["type"] for index, event in events.items()} == {
        0: "image.done",
        1: "image.done",
        2: "image.skipped",
        3: "image.failed",
        None: "job.closed",
    }
    assert events[1]["data"]["review"]
    assert events[0]["data"]["source"] == str(places.key("0 é.jpg"))
    assert events[0]["data"]["cutout"] == str(places.cutout("0 é.jpg"))
    assert (events[3]["data"]["code"], "cutout" in events[3]["data"]) == ("not_an_image", False)


def test_replay_delivers_every_event_again_with_the_same_id(
    cutfleet: Run,
    stack: LocalStack,
    places: Places,
    store: Store,
    own_ledger: Ledger,
    receiver: Receiver,
    deliver: Deliver,
) -> None:
    job = submit_live(places, own_ledger, store, receiver.url, images=True, count=2)
    finish(job, 0, own_ledger)
    finish(job, 1, own_ledger, ImageState.FAILED)
    close(job, own_ledger, store)
    deliver()
    secret = {"CUTFLEET_WEBHOOK_SECRET": WEBHOOK_SECRET, "CUTFLEET_WEBHOOK_PRIVATE": "true"}

    ran = cutfleet("webhooks", "replay", job.id, env=secret | {"CUTFLEET_REDIS_URL": own_redis_url(stack)})
    deliver()

    assert (ran.returncode, ran.stderr) == (0, f"Due again: 3 webhooks of job {job.id}.\n")
    deliveries = collections.Counter(received_ids(receiver))
    assert (len(deliveries), set(deliveries.values())) == (3, {2})


def test_events_that_happen_again_after_a_retry_have_new_ids(
    places: Places, store: Store, own_ledger: Ledger, receiver: Receiver, deliver: Deliver
) -> None:
    job = submit_live(places, own_ledger, store, receiver.url, images=True, count=2)
    finish(job, 0, own_ledger, ImageState.FAILED)
    finish(job, 1, own_ledger)
    close(job, own_ledger, store)
    deliver()
    first = set(received_ids(receiver))
    receiver.received.clear()

    replay_failures(job, own_ledger, store)
    finish(job, 0, own_ledger, ImageState.FAILED)
    close(job, own_ledger, store)
    deliver()
    second = set(received_ids(receiver))
    assert sorted(event["type"] for event in receiver.events()) == ["image.failed", "job.closed"]
    receiver.received.clear()
    assert replay(own_ledger.jobs.get(job.id), ledger=own_ledger) == 3
    deliver()

    assert len(first) == 3
    assert len(second) == 2
    assert not first & second, "a receiver that drops duplicates gets both"
    assert set(received_ids(receiver)) == second | {f"{job.id}-1-done"}
    assert f"{job.id}-1-done" in first, "the other image has not changed"


def test_an_image_that_is_reopened_before_its_delivery_has_an_event_when_it_is_final_again(
    places: Places, store: Store, own_ledger: Ledger, receiver: Receiver, deliver: Deliver
) -> None:
    job = submit_live(places, own_ledger, store, receiver.url, images=True)
    finish(job, 0, own_ledger, ImageState.FAILED)
    replay_failures(job, own_ledger, store)

    deliver()
    assert (receiver.received, own_ledger.outbox.due_receivers(limit=10)) == ([], [])
    finish(job, 0, own_ledger)
    deliver()

    assert [event["type"] for event in receiver.events()] == ["image.done"]
    assert own_ledger.jobs.get(job.id).undelivered == 0


def test_a_replay_into_an_almost_full_outbox_delivers_every_event(
    places: Places, store: Store, own_ledger: Ledger, receiver: Receiver, deliver: Deliver
) -> None:
    job = submit_live(places, own_ledger, store, receiver.url, images=True, count=6)
    for index in range(job.total):
        finish(job, index, own_ledger)
    close(job, own_ledger, store)
    deliver()
    receiver.received.clear()
    fill_outbox(receiver, MAX_EVENTS_PER_RECEIVER - 4, own_ledger)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        replayed = pool.submit(replay, own_ledger.jobs.get(job.id), ledger=own_ledger)
        wait_until(lambda: deliver() or len(receiver.received) >= 7, what="all are delivered again")

    assert replayed.result() == 7
    assert sorted(event["data"].get("index", -1) for event in receiver.events()) == list(range(-1, 6))
    assert own_ledger.jobs.get(job.id).undelivered == 0


def test_an_event_that_waits_already_needs_no_room_in_a_full_outbox(
    places: Places, store: Store, own_ledger: Ledger, receiver: Receiver
) -> None:
    job = submit_live(places, own_ledger, store, receiver.url, images=True, count=2)
    finish(job, 0, own_ledger, ImageState.FAILED)
    fill_outbox(receiver, MAX_EVENTS_PER_RECEIVER, own_ledger)
    replay_failures(job, own_ledger, store)

    finish(job, 0, own_ledger, ImageState.FAILED)
    assert own_ledger.jobs.get(job.id).undelivered == 0
    finish(job, 1, own_ledger)

    assert own_ledger.jobs.get(job.id).undelivered == 1
    assert own_ledger.outbox.replay_images(job.id, 0, 2) == (1, 1), "the second event does not fit"


@pytest.mark.parametrize(("status", "deliveries"), [(410, 1), (500, 2)])
def test_an_event_that_is_given_up_is_counted_and_its_url_and_secret_are_never_logged(
    places: Places,
    store: Store,
    own_ledger: Ledger,
    receiver: Receiver,
    deliver: Deliver,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    status: int,
    deliveries: int,
) -> None:
    monkeypatch.setattr("producer.webhooks.delivery.MAX_ATTEMPTS", 2)
    receiver.statuses = [status] * 2
    job = submit_live(places, own_ledger, store, receiver.url)
    finish(job, 0, own_ledger)
    close(job, own_ledger, store)

    with caplog.at_level(logging.DEBUG):
        wait_until(lambda: deliver() or own_ledger.jobs.get(job.id).undelivered == 1, what="it is given up")

    assert len(receiver.received) == deliveries
    assert "given up" in caplog.text
    assert "hidden" not in caplog.text
    assert WEBHOOK_SECRET not in caplog.text


def test_an_event_that_happens_again_during_its_delivery_is_delivered_again(
    places: Places, store: Store, own_ledger: Ledger
) -> None:
    job = submit_live(places, own_ledger, store, "http://127.0.0.1:9/", images=True)
    finish(job, 0, own_ledger)
    (receiver,) = own_ledger.outbox.due_receivers(limit=10)
    (event,) = own_ledger.outbox.take(receiver, limit=10, lease_s=60)
    assert own_ledger.outbox.take(receiver, limit=10, lease_s=60) == []
    assert own_ledger.outbox.due_receivers(limit=10) == []

    own_ledger.outbox.replay_images(job.id, 0, 1)
    own_ledger.outbox.finish(event, delivered=True)

    (again,) = own_ledger.outbox.take(receiver, limit=10, lease_s=60)
    own_ledger.outbox.finish(again, delivered=True)
    assert again.id == event.id == f"{job.id}:0"


def test_a_receiver_that_never_answers_delays_no_other(
    places: Places, store: Store, own_ledger: Ledger, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.webhooks.safe_post.TIMEOUT_S", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as silent, delivering(own_ledger, store, SETTINGS, threading.Event()):
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        for _ in range(2):  # jobs of one receiver share its queue
            slow = submit_live(places, own_ledger, store, url, images=True, count=40)
            for index in range(slow.total):
                finish(slow, index, own_ledger)
        connection, _ = silent.accept()
        job = submit_live(places, own_ledger, store, receiver.url, images=True, count=40)
        for index in range(job.total):
            finish(job, index, own_ledger)
        wait_until(lambda: len(set(received_ids(receiver))) == job.total, what="the other gets all its events")
        failed = own_ledger.connection.call("hlen", "cf:outbox:tries")
        connection.close()

    assert failed < 40, "the 80 earlier events did not go first"


def test_the_outbox_is_limited_for_each_receiver_and_for_all(
    places: Places, store: Store, own_ledger: Ledger, receiver: Receiver, deliver: Deliver
) -> None:
    job = submit_live(places, own_ledger, store, receiver.url, images=True, count=3)
    call = own_ledger.connection.call
    outbox = fill_outbox(receiver, MAX_EVENTS_PER_RECEIVER, own_ledger)
    finish(job, 0, own_ledger)
    call("delete", outbox)
    call("set", "cf:outbox:size", MAX_EVENTS)
    finish(job, 1, own_ledger)
    assert own_ledger.jobs.get(job.id).undelivered == 2
    call("set", "cf:outbox:size", 0)
    finish(job, 2, own_ledger)
    assert call("get", "cf:outbox:size") == "1"

    deliver()

    assert call("get", "cf:outbox:size") == "0"
    assert [event["data"]["index"] for event in receiver.events()] == [2]


def test_two_secrets_both_sign_while_the_secret_is_changed() -> None:
    headers = Payload("id", b"{}").signed_headers(f"{WEBHOOK_SECRET} {OLD_SECRET}", now=time.time())

    assert Webhook(WEBHOOK_SECRET).verify("{}", headers) == Webhook(OLD_SECRET).verify("{}", headers) == {}


def test_a_webhook_that_could_not_be_delivered_is_refused_at_submission(cutfleet: Run, places: Places) -> None:
    with pytest.raises(SettingsError, match="CUTFLEET_WEBHOOK_SECRET"):
        check_webhook("https://93.184.215.14/", Settings())
    with pytest.raises(SettingsError, match="private address") as refused:
        check_webhook("https://127.0.0.1/", Settings(webhook_secret=WEBHOOK_SECRET))
    assert refused.value.code == "webhook_refused"

    ran = cutfleet(
        *["submit", places.source, "--to", places.to, "--webhook", "https://127.0.0.1/"],
        env={"CUTFLEET_WEBHOOK_SECRET": "whsec_short"},
    )

    assert ran.returncode == 2
    assert "CUTFLEET_WEBHOOK_SECRET" in ran.stderr
    assert "whsec_short" not in ran.stderr
