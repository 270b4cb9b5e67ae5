"""Telling people: real ledger, real store, real receivers, signatures checked by the library that receivers use."""

from __future__ import annotations

import collections
import concurrent.futures
import hashlib
import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator

import pytest
import redis
from standardwebhooks import Webhook, WebhookVerificationError

from jobs.errors import SettingsError
from jobs.job import Failure, ImageState, Job
from jobs.ledger import Ledger
from jobs.recipe import Recipe
from jobs.s3.client import Store
from jobs.settings import Settings
from producer.demo.local_stack import LocalStack
from producer.dispatcher.dispatcher import Dispatcher
from producer.records import failures as dead
from producer.submission import submit as submission
from producer.webhooks.delivery import Deliverer, check_webhook, delivering, replay, signed_headers
from tests.support.environment import Run
from tests.support.factories import WEBHOOK_SECRET, Places, Receiver, wait_until

SECRET = WEBHOOK_SECRET
OLD_SECRET = "whsec_YWJjZGVmZ2hpamFiY2RlZmdoaWphYmNkZWZnaGlqYWI="  # noqa: S105
SETTINGS = Settings(webhook_secret=SECRET, webhook_private=True, retry_base_s=0.01)


@pytest.fixture
def quiet_url(stack: LocalStack) -> str:
    """A database where no other dispatcher delivers."""
    return stack.environment["CUTFLEET_REDIS_URL"].replace("/0", "/3")


@pytest.fixture
def quiet(quiet_url: str) -> Iterator[Ledger]:
    with Ledger(quiet_url, name="no dispatcher here") as ledger:
        ledger._call("flushdb")
        yield ledger


@pytest.fixture
def deliver(quiet: Ledger, store: Store) -> Callable[[], None]:
    """One turn of deliveries, until the last has ended."""
    deliverer = Deliverer(quiet, store, SETTINGS)

    def turn() -> None:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            deliverer.step(pool)

    return turn


def void(_: object) -> None: ...


def submitted(
    places: Places, store: Store, ledger: Ledger, webhook: str, *, images: bool = False, count: int = 1
) -> Job:
    request = submission.Request(
        source=places.source,
        destination=places.to,
        recipe=Recipe(),
        lane="live",
        name="",
        keys=tuple(f"{n} é.jpg" for n in range(count)),
        webhook=webhook,
        webhook_images=images,
    )
    return submission.submit(request, store=store, ledger=ledger, lease_s=60, listed=void)


def finish(job: Job, index: int, ledger: Ledger, state: ImageState = ImageState.DONE) -> None:
    claim = ledger.claim(f"{job.id}:{index}", token=uuid.uuid4().hex, output=f"{job.id}/{index}", lease_s=60)
    failure = Failure(f"{index} é.jpg", "not_an_image", "no image", 1, 0.0, "w") if state == ImageState.FAILED else None
    assert ledger.finish(claim, state, failure) == "ok"


def dispatch(is_so: Callable[[], bool], ledger: Ledger, store: Store, *, what: str) -> None:
    dispatcher = Dispatcher(ledger, store, SETTINGS)
    wait_until(lambda: dispatcher.step() or is_so(), what=what)
    dispatcher.close()


def close(job: Job, ledger: Ledger, store: Store) -> Job:
    dispatch(lambda: ledger.job(job.id).closed is not None, ledger, store, what="the job is closed")
    return ledger.job(job.id)


def retry(job: Job, ledger: Ledger, store: Store) -> None:
    """What failed is on its queue again."""
    assert dead.retry(job, None, ledger=ledger, store=store)
    dispatch(lambda: not ledger.job(job.id).again, ledger, store, what="it is fed once more")


def outbox_of(receiver: Receiver) -> str:
    return f"cf:outbox:{hashlib.sha1(receiver.url.encode(), usedforsecurity=False).hexdigest()}"


def ids(receiver: Receiver) -> list[str]:
    return [headers["webhook-id"] for headers, _ in receiver.got]


def test_a_receiver_that_fails_twice_gets_its_third_delivery_signed(
    places: Places, store: Store, quiet: Ledger, receiver: Receiver, deliver: Callable[[], None]
) -> None:
    receiver.statuses = [500, 503]
    job = submitted(places, store, quiet, receiver.url)
    finish(job, 0, quiet)
    job = close(job, quiet, store)

    wait_until(lambda: deliver() or len(receiver.got) == 3, within_s=20, what="three deliveries")
    deliver()

    events = receiver.events()
    assert [event["type"] for event in events] == ["job.closed"] * 3
    assert events[2]["data"]["job"] == job.id
    assert (events[2]["data"]["done"], events[2]["data"]["state"]) == (1, "closed")
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1, "one event, one id"
    headers, body = receiver.got[2]
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(body.replace('"done": 1', '"done": 2'), dict(headers))
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(body, dict(headers) | {"webhook-timestamp": "1"})


def test_each_image_is_told_with_what_became_of_it(
    places: Places, store: Store, quiet: Ledger, receiver: Receiver, deliver: Callable[[], None]
) -> None:
    job = submitted(places, store, quiet, receiver.url, images=True, count=4)
    states = [ImageState.DONE, ImageState.REVIEW, ImageState.SKIPPED, ImageState.FAILED]
    for index, state in enumerate(states[:2]):
        finish(job, index, quiet, state)
    deliver()
    for index, state in enumerate(states[2:], 2):
        finish(job, index, quiet, state)
    close(job, quiet, store)  # its rows are in S3 now, not in the ledger
    deliver()

    found = {event["data"].get("index"): event for event in receiver.events()}
    assert {index: event["type"] for index, event in found.items()} == {
        0: "image.done",
        1: "image.done",
        2: "image.skipped",
        3: "image.failed",
        None: "job.closed",
    }
    assert found[1]["data"]["review"]
    assert found[0]["data"]["source"] == str(places.key("0 é.jpg"))
    assert found[0]["data"]["cutout"] == str(places.cutout("0 é.jpg"))
    assert (found[3]["data"]["code"], "cutout" in found[3]["data"]) == ("not_an_image", False)


def test_replay_tells_all_again_under_the_same_ids(
    cutfleet: Run,
    places: Places,
    store: Store,
    quiet: Ledger,
    quiet_url: str,
    receiver: Receiver,
    deliver: Callable[[], None],
) -> None:
    job = submitted(places, store, quiet, receiver.url, images=True, count=2)
    finish(job, 0, quiet)
    finish(job, 1, quiet, ImageState.FAILED)
    close(job, quiet, store)
    deliver()
    env = {"CUTFLEET_REDIS_URL": quiet_url, "CUTFLEET_WEBHOOK_SECRET": SECRET, "CUTFLEET_WEBHOOK_PRIVATE": "true"}

    ran = cutfleet("webhooks", "replay", job.id, env=env)
    deliver()

    assert (ran.returncode, ran.stderr) == (0, f"Due again: 3 webhooks of job {job.id}.\n")
    times = collections.Counter(ids(receiver))
    assert (len(times), set(times.values())) == (3, {2})


def test_what_happens_once_more_after_a_retry_has_an_id_of_its_own(
    places: Places, store: Store, quiet: Ledger, receiver: Receiver, deliver: Callable[[], None]
) -> None:
    job = submitted(places, store, quiet, receiver.url, images=True, count=2)
    finish(job, 0, quiet, ImageState.FAILED)
    finish(job, 1, quiet)
    close(job, quiet, store)
    deliver()
    first = set(ids(receiver))
    receiver.got.clear()

    retry(job, quiet, store)
    finish(job, 0, quiet, ImageState.FAILED)
    close(job, quiet, store)
    deliver()
    again = set(ids(receiver))
    assert sorted(event["type"] for event in receiver.events()) == ["job.closed", "image.failed"]
    receiver.got.clear()
    assert replay(quiet.job(job.id), ledger=quiet) == 3
    deliver()

    assert len(first) == 3
    assert len(again) == 2
    assert not first & again, "a receiver that drops what it has seen hears of both"
    assert set(ids(receiver)) == again | {f"{job.id}-1-done"}
    assert f"{job.id}-1-done" in first, "of the other nothing is new"


def test_an_image_that_is_open_again_is_told_when_it_is_final_once_more(
    places: Places, store: Store, quiet: Ledger, receiver: Receiver, deliver: Callable[[], None]
) -> None:
    job = submitted(places, store, quiet, receiver.url, images=True)
    finish(job, 0, quiet, ImageState.FAILED)
    retry(job, quiet, store)

    deliver()
    assert (receiver.got, quiet.receivers_due(limit=10)) == ([], []), "nothing is known of it now"
    finish(job, 0, quiet)
    deliver()

    assert [event["type"] for event in receiver.events()] == ["image.done"]
    assert quiet.job(job.id).untold == 0


def test_a_replay_with_little_room_leaves_nothing_out(
    places: Places, store: Store, quiet: Ledger, quiet_url: str, receiver: Receiver, deliver: Callable[[], None]
) -> None:
    job = submitted(places, store, quiet, receiver.url, images=True, count=6)
    for index in range(job.total):
        finish(job, index, quiet)
    close(job, quiet, store)
    deliver()
    receiver.got.clear()

    def told_again() -> bool:
        deliver()
        return len(receiver.got) >= 7

    with redis.Redis.from_url(quiet_url) as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        server.zadd(outbox_of(receiver), {f"gone:{number}": time.time() + 3600 for number in range(20_000 - 4)})
        replayed = pool.submit(replay, quiet.job(job.id), ledger=quiet)
        wait_until(told_again, what="all are told again")

    assert replayed.result() == 7
    assert sorted(event["data"].get("index", -1) for event in receiver.events()) == list(range(-1, 6))
    assert quiet.job(job.id).untold == 0


def test_an_event_that_waits_already_needs_no_room(
    places: Places, store: Store, quiet: Ledger, quiet_url: str, receiver: Receiver
) -> None:
    job = submitted(places, store, quiet, receiver.url, images=True, count=2)
    finish(job, 0, quiet, ImageState.FAILED)
    with redis.Redis.from_url(quiet_url) as server:
        server.zadd(outbox_of(receiver), {f"gone:{number}": time.time() + 3600 for number in range(20_000)})
    retry(job, quiet, store)

    finish(job, 0, quiet, ImageState.FAILED)
    assert quiet.job(job.id).untold == 0
    finish(job, 1, quiet)

    assert quiet.job(job.id).untold == 1
    assert quiet.retell(job.id, 0, 2) == (1, 1), "the second does not fit"


@pytest.mark.parametrize("status", [410, 500])
def test_what_can_not_be_told_is_counted_and_never_shown(
    places: Places,
    store: Store,
    quiet: Ledger,
    receiver: Receiver,
    deliver: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    status: int,
) -> None:
    monkeypatch.setattr("producer.webhooks.delivery.MAX_TRIES", 2)
    receiver.statuses = [status] * 2
    job = submitted(places, store, quiet, receiver.url)
    finish(job, 0, quiet)
    close(job, quiet, store)

    with caplog.at_level(logging.DEBUG):
        wait_until(lambda: deliver() or quiet.job(job.id).untold == 1, what="it is given up")

    assert len(receiver.got) == (1 if status == 410 else 2)
    assert "given up" in caplog.text
    assert "hidden" not in caplog.text
    assert SECRET not in caplog.text


def test_an_event_that_happens_again_during_its_delivery_is_told_again(
    places: Places, store: Store, quiet: Ledger
) -> None:
    job = submitted(places, store, quiet, "http://127.0.0.1:9/", images=True)
    finish(job, 0, quiet)
    (receiver,) = quiet.receivers_due(limit=10)
    (event,) = quiet.take_events(receiver, limit=10, lease_s=60)
    assert quiet.take_events(receiver, limit=10, lease_s=60) == quiet.receivers_due(limit=10) == [], "nobody gets it"

    quiet.retell(job.id, 0, 1)
    quiet.finish_event(event, told=True)

    (again,) = quiet.take_events(receiver, limit=10, lease_s=60)
    quiet.finish_event(again, told=True)
    assert again.id == event.id == f"{job.id}:0"


def test_a_receiver_that_never_answers_keeps_no_other_waiting(
    places: Places,
    store: Store,
    quiet: Ledger,
    quiet_url: str,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("producer.webhooks.safe_post.TIMEOUT_S", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as silent, delivering(quiet, store, SETTINGS, threading.Event()):
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        for _ in range(2):  # jobs of one receiver share its turn
            slow = submitted(places, store, quiet, url, images=True, count=40)
            for index in range(slow.total):
                finish(slow, index, quiet)
        asked, _ = silent.accept()
        job = submitted(places, store, quiet, receiver.url, images=True, count=40)
        for index in range(job.total):
            finish(job, index, quiet)
        wait_until(lambda: len(set(ids(receiver))) == job.total, what="the other is told all")
        with redis.Redis.from_url(quiet_url) as server:
            tried = server.hlen("cf:outbox:tries")
        asked.close()

    assert tried < 40, "the 80 before it did not have their turn first"


def test_a_receiver_that_is_away_does_not_fill_redis(
    places: Places, store: Store, quiet: Ledger, quiet_url: str, receiver: Receiver, deliver: Callable[[], None]
) -> None:
    job = submitted(places, store, quiet, receiver.url, images=True, count=3)
    outbox = outbox_of(receiver)
    with redis.Redis.from_url(quiet_url, decode_responses=True) as server:
        server.zadd(outbox, {f"gone:{number}": time.time() + 60 for number in range(20_000)})
        finish(job, 0, quiet)
        server.delete(outbox)
        server.set("cf:outbox:size", 100_000)
        finish(job, 1, quiet)
        assert quiet.job(job.id).untold == 2
        server.set("cf:outbox:size", 0)
        finish(job, 2, quiet)
        assert server.get("cf:outbox:size") == "1"
        deliver()
        assert server.get("cf:outbox:size") == "0"

    assert [event["data"]["index"] for event in receiver.events()] == [2]


def test_two_secrets_both_sign_while_they_are_changed() -> None:
    headers = signed_headers("id", b"{}", f"{SECRET} {OLD_SECRET}", now=time.time())

    assert Webhook(SECRET).verify("{}", headers) == Webhook(OLD_SECRET).verify("{}", headers) == {}


def test_a_webhook_that_could_not_be_told_is_refused_at_once(cutfleet: Run, places: Places) -> None:
    with pytest.raises(SettingsError, match="CUTFLEET_WEBHOOK_SECRET"):
        check_webhook("https://93.184.215.14/", Settings())
    with pytest.raises(SettingsError, match="private address") as refused:
        check_webhook("https://127.0.0.1/", Settings(webhook_secret=SECRET))
    assert refused.value.code == "webhook_refused"

    ran = cutfleet(
        *["submit", places.source, "--to", places.to, "--webhook", "https://127.0.0.1/"],
        env={"CUTFLEET_WEBHOOK_SECRET": "whsec_short"},
    )

    assert ran.returncode == 2
    assert "CUTFLEET_WEBHOOK_SECRET" in ran.stderr
    assert "whsec_short" not in ran.stderr
