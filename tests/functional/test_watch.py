"""Watches: SQS clients with a server of its protocol (moto), and webhooks of SeaweedFS."""

from __future__ import annotations

import collections
import json
import os
import re
import socket
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import boto3
import pytest
from moto.server import ThreadedMotoServer

from jobs.envelope import parse_message
from jobs.errors import SettingsError
from jobs.job import Job
from jobs.ledger import Ledger
from jobs.recipe import Recipe
from jobs.s3.client import Store
from jobs.s3.location import Location
from jobs.sqs import SqsMessage, SqsQueue
from producer.demo.local_stack import LocalStack, Process, free_port, inherited_environment
from producer.ingest import watcher as watcher_module
from producer.ingest.notifications import Arrival
from producer.ingest.watcher import BacklogFull, Watcher, run_watch
from producer.submission.request import Request
from tests.support.environment import Run
from tests.support.images import put_images
from tests.support.places import Places
from tests.support.s3_events import s3_event
from tests.support.waiting import wait_past_midnight, wait_until

UNSERVED_MODEL = "u2net"
"""No worker serves it: images stay open."""
TOKEN = "only-for-this-test"  # noqa: S105
Start = Callable[..., Process]


@pytest.fixture(scope="module")
def sqs() -> Iterator[Any]:
    """A client of an SQS server, which the environment also names."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    os.environ["AWS_ENDPOINT_URL_SQS"] = f"http://{host}:{port}"
    credentials = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
    before = {name: os.environ.get(name) for name in credentials}
    os.environ.update(credentials)
    try:
        yield boto3.client("sqs")
    finally:
        server.stop()
        for name, value in (before | {"AWS_ENDPOINT_URL_SQS": None}).items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


@pytest.fixture(autouse=True)
def one_day() -> None:
    wait_past_midnight()


@pytest.fixture
def queue(sqs: Any, places: Places) -> str:
    """The URL of a queue that delivers a message again one second after it was received."""
    name = places.source_location.bucket
    return str(sqs.create_queue(QueueName=name, Attributes={"VisibilityTimeout": "1"})["QueueUrl"])


@pytest.fixture
def start_watch(stack: LocalStack, places: Places, tmp_path: Path) -> Iterator[Start]:
    """Starts `cutfleet watch` for a model that no worker serves."""
    started: list[Process] = []

    def start(*options: str, **environment: str) -> Process:
        program = [
            sys.executable,
            "-m",
            "producer",
            "watch",
            places.source,
            "--to",
            places.to,
            "--model",
            UNSERVED_MODEL,
        ]
        program += options
        env = inherited_environment() | stack.environment | environment
        started.append(Process(program, log=tmp_path / f"watch-{len(started)}.log", env=env))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()


def watcher_of(places: Places, store: Store, ledger: Ledger) -> Watcher:
    request = Request(
        source=places.source_location,
        destination=places.destination,
        recipe=Recipe(model=UNSERVED_MODEL),
        lane="live",
        name="",
        keys=None,
    )
    return Watcher(request, store=store, ledger=ledger, lease_s=60)


def put_event(places: Places, key: str, etag: str) -> str:
    return json.dumps(s3_event(quote_plus(key, safe="/"), bucket=places.source_location.bucket, etag=etag))


def arrival(places: Places, key: str, etag: str = "e") -> Arrival:
    return Arrival(places.key(key), etag, 5)


def send(sqs: Any, queue: str, bodies: Sequence[str]) -> None:
    for first in range(0, len(bodies), 10):
        entries = [{"Id": str(i), "MessageBody": body} for i, body in enumerate(bodies[first : first + 10])]
        sqs.send_message_batch(QueueUrl=queue, Entries=entries)


def jobs_of(ledger: Ledger, places: Places) -> list[Job]:
    return [job for job in ledger.jobs.newest() if job.source == places.source_location]


def total(ledger: Ledger, places: Places) -> int:
    return sum(job.total for job in jobs_of(ledger, places))


def keys_on_queue(ledger: Ledger, job: Job) -> collections.Counter[str]:
    """Count the queued messages of each key."""
    return collections.Counter(
        parse_message(message).key for image, message in ledger.window.entries() if image.startswith(f"{job.id}:")
    )


def count_messages(sqs: Any, queue: str) -> int:
    names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
    found = sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=names)["Attributes"]
    return sum(int(count) for count in found.values())


def test_a_killed_watch_takes_each_image_of_a_burst_once(
    stack: LocalStack, ledger: Ledger, places: Places, sqs: Any, queue: str, start_watch: Start
) -> None:
    keys = [f"neu/фото {n} +50%.jpg" for n in range(500)]
    bodies = [put_event(places, key, f"etag-{n}") for n, key in enumerate(keys)]
    first = start_watch("--queue", queue)

    send(sqs, queue, bodies[:250] + bodies[:25])
    wait_until(lambda: total(ledger, places) > 0, what="the first are taken")
    first.kill()
    send(sqs, queue, bodies[200:])
    second = start_watch("--queue", queue)
    wait_until(lambda: total(ledger, places) >= 500, what="all are taken")
    second.kill()
    send(sqs, queue, bodies[::20])
    start_watch("--queue", queue)
    wait_until(lambda: count_messages(sqs, queue) == 0, what="the queue is empty")

    (job,) = jobs_of(ledger, places)
    assert (job.total, job.lane, job.open) == (500, "live", 500)
    assert keys_on_queue(ledger, job) == collections.Counter(keys)


def test_a_message_is_deleted_only_after_the_ledger_has_its_arrivals(
    stack: LocalStack, store: Store, ledger: Ledger, places: Places, sqs: Any, queue: str
) -> None:
    class KilledBeforeDelete(SqsQueue):
        def delete(self, messages: Sequence[SqsMessage]) -> None:
            raise KeyboardInterrupt

    watcher = watcher_of(places, store, ledger)
    send(sqs, queue, [put_event(places, f"{n}.jpg", "e") for n in range(12)] + ["no event"])

    with KilledBeforeDelete(queue) as sqs_queue, pytest.raises(KeyboardInterrupt):
        watcher.take_messages(sqs_queue, wait_s=1)
    taken_before = total(ledger, places)
    with SqsQueue(queue) as sqs_queue:
        wait_until(lambda: watcher.take_messages(sqs_queue, wait_s=1) >= 0 and count_messages(sqs, queue) == 1)

    assert taken_before > 0
    assert total(ledger, places) == 12
    assert count_messages(sqs, queue) == 1, "an unreadable message stays for the dead-letter queue"


def test_one_version_is_taken_once_and_each_new_one_again(store: Store, ledger: Ledger, places: Places) -> None:
    watcher = watcher_of(places, store, ledger)
    elsewhere = Arrival(Location("elsewhere", "a.jpg"), "A", 5)

    def put(etag: str) -> int:
        return watcher.take([arrival(places, "a.jpg", etag)])

    assert [put("A"), put("A"), put("B"), put("A"), put("A")] == [1, 0, 1, 1, 0]
    assert watcher.take([arrival(places, "folder/"), elsewhere]) == 0


def test_the_keys_of_a_watch_expire_when_it_no_longer_runs(store: Store, ledger: Ledger, places: Places) -> None:
    watcher = watcher_of(places, store, ledger)
    watcher.sweep(threading.Event())
    watcher.take([arrival(places, "a.jpg")])

    ttls_s = [ledger.connection.call("ttl", f"cf:watch:{watcher.id}{suffix}") for suffix in ("", ":seen", ":when")]

    assert all(86_400 < seconds <= 30 * 86_400 for seconds in ttls_s), ttls_s


def test_a_watch_without_a_recorded_listing_logs_the_command_for_older_objects(
    store: Store,
    ledger: Ledger,
    places: Places,
    cutfleet: Run,
    caplog: pytest.LogCaptureFixture,
) -> None:
    put_images(store, places, 3)
    watcher = watcher_of(places, store, ledger)

    def begin() -> list[str]:
        caplog.clear()
        watcher.begin(existing=False)
        return warnings(caplog)

    first, second = begin(), begin()
    ledger.connection.call("delete", f"cf:watch:{watcher.id}")  # as after 30 days without a run
    expired = begin()

    assert second == []
    assert first == expired
    (command,) = re.findall("cutfleet (.*) --since DATE", first[0])
    ran = cutfleet(*command.split(), "--since", "2000-01-01")
    assert ledger.jobs.get(ran.stdout.strip()).total == 3


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings of the watch; servers in this process log others."""
    return [
        row.getMessage()
        for row in caplog.records
        if row.name == "producer.ingest.watcher" and row.levelname == "WARNING"
    ]


def test_a_watch_with_existing_lists_all_objects(
    store: Store, ledger: Ledger, places: Places, caplog: pytest.LogCaptureFixture
) -> None:
    watcher = watcher_of(places, store, ledger)

    watcher.begin(existing=True)

    assert ledger.watches.last_sweep(watcher.id) == 0
    assert warnings(caplog) == []


def test_two_processes_of_a_watch_take_each_image_of_a_burst_once(
    stack: LocalStack, store: Store, places: Places
) -> None:
    arrivals = [arrival(places, f"{n}.jpg") for n in range(300)]

    with stack.ledger() as one, stack.ledger() as other:
        watchers = [watcher_of(places, store, ledger) for ledger in (one, other)]
        taken: list[int] = []
        threads = [
            threading.Thread(target=lambda w=w: taken.extend(w.take(arrivals[i : i + 30]) for i in range(0, 300, 10)))
            for w in watchers
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        (job,) = jobs_of(one, places)
        assert sum(taken) == job.total == 300
        assert set(keys_on_queue(one, job).values()) == {1}


def test_a_sweep_finds_objects_without_an_event(store: Store, ledger: Ledger, places: Places) -> None:
    put_images(store, places, 3)
    watcher = watcher_of(places, store, ledger)
    watcher.begin(existing=True)

    taken = [watcher.sweep(threading.Event()) for _ in range(2)]
    put_images(store, places, 2, start=3)
    taken.append(watcher.sweep(threading.Event()))

    assert taken == [3, 0, 2]


def test_arrivals_are_refused_while_the_backlog_is_full(
    store: Store, ledger: Ledger, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watcher_module, "MAX_BACKLOG", 2)
    watcher = watcher_of(places, store, ledger)

    watcher.take([arrival(places, f"{n}.jpg") for n in range(2)])
    with pytest.raises(BacklogFull):
        watcher.take([arrival(places, "one too many.jpg")])

    assert total(ledger, places) == 2


def test_a_listed_job_of_today_is_followed_by_another(
    stack: LocalStack, store: Store, ledger: Ledger, places: Places
) -> None:
    watcher = watcher_of(places, store, ledger)
    watcher.take([arrival(places, "a.jpg")])
    (first,) = jobs_of(ledger, places)
    ledger.jobs.finish_listing(first.id)

    watcher.take([arrival(places, "b.jpg")])

    assert {job.id: job.total for job in jobs_of(ledger, places)} == {first.id: 1, f"{first.id}-2": 1}


@contextmanager
def notifying_seaweedfs(endpoint: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalStack]:
    """Start a stack whose SeaweedFS sends its events to `endpoint`. It reads that setting from its user's home."""
    settings = folder / "home" / ".seaweedfs" / "notification.toml"
    settings.parent.mkdir(parents=True)
    settings.write_text(
        "[notification.webhook]\nenabled = true\n"
        f'endpoint = "{endpoint}"\nbearer_token = "{TOKEN}"\nevent_types = ["create", "update", "rename"]\n'
    )
    monkeypatch.setenv("HOME", str(folder / "home"))
    with LocalStack(folder / "stack") as stack:
        yield stack


def start_listening(stack: LocalStack, places: Places, port: int, folder: Path, *options: str) -> Process:
    """Start a `cutfleet watch` that listens at `port` and sweeps only once, at its start."""
    options = ("--listen", f"127.0.0.1:{port}", "--sweep-every", "3600", *options)
    program = [sys.executable, "-m", "producer", "watch", places.source, "--to", places.to, *options]
    env = inherited_environment() | stack.environment | {"CUTFLEET_WATCH_TOKEN": TOKEN}
    process = Process(program, log=folder / "watch.log", env=env)
    wait_until(lambda: is_listening(port), what="the watch listens")
    return process


def test_objects_put_into_seaweedfs_are_cut_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    places = Places("s3://shop/new/", "s3://shop-cutouts/")
    notifying = notifying_seaweedfs(f"http://127.0.0.1:{port}/events", tmp_path, monkeypatch)

    with notifying as stack, stack.store() as store, stack.ledger() as ledger:
        for bucket in ("shop", "shop-cutouts"):
            store.create_bucket(bucket)
        watching = start_listening(stack, places, port, tmp_path)
        stack.start_dispatcher()
        stack.start_worker(device="cpu")
        names = put_images(store, places, 2)
        store.put(places.key("фото (1)+%.jpg"), b"no image", content_type="image/jpeg")
        wait_until(lambda: [job.final for job in jobs_of(ledger, places)] == [3], what="three are final")
        watching.kill()
        names += put_images(store, places, 2, start=2)  # no process receives their events
        watching = start_listening(stack, places, port, tmp_path)
        wait_until(lambda: [job.final for job in jobs_of(ledger, places)] == [5], what="five are final")
        watching.stop()

        (job,) = jobs_of(ledger, places)
        assert (job.done, job.failed) == (4, 1)
        assert all(store.head(places.cutout(name), role="output") for name in names)


def test_a_killed_watch_takes_each_image_of_a_burst_into_seaweedfs_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    places = Places("s3://shop/new/", "s3://shop-cutouts/")
    notifying = notifying_seaweedfs(f"http://127.0.0.1:{port}/events", tmp_path, monkeypatch)
    names = [f"neu/фото {number} +50%.jpg" for number in range(500)]

    def put(name: str) -> None:
        store.put(places.key(name), name.encode(), content_type="image/jpeg")

    with notifying as stack, stack.store() as store, stack.ledger() as ledger, ThreadPoolExecutor(4) as putting:
        for bucket in ("shop", "shop-cutouts"):
            store.create_bucket(bucket)
        watching = start_listening(stack, places, port, tmp_path, "--model", UNSERVED_MODEL)
        burst = [putting.submit(put, name) for name in names[:300]]
        wait_until(lambda: total(ledger, places) > 0, what="the first are taken")
        watching.kill()
        taken_before_kill = total(ledger, places)
        watching = start_listening(stack, places, port, tmp_path, "--model", UNSERVED_MODEL)
        burst += [putting.submit(put, name) for name in names[300:]]
        for one in burst:
            one.result()
        wait_until(lambda: total(ledger, places) >= len(names), what="all are taken")
        watching.stop()

        (job,) = jobs_of(ledger, places)
        assert 0 < taken_before_kill < len(names), "it was killed during the burst"
        assert keys_on_queue(ledger, job) == collections.Counter(places.key(name).key for name in names)


def is_listening(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz") as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_a_port_in_use_is_refused(store: Store, ledger: Ledger, places: Places) -> None:
    watcher = watcher_of(places, store, ledger)

    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(SettingsError) as refused:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        run_watch(watcher, threading.Event(), queue=None, listen=address, token=TOKEN, sweep_every_s=60)

    assert refused.value.code == "cannot_listen"


def test_the_webhook_refuses_wrong_tokens_and_malformed_bodies(
    stack: LocalStack, ledger: Ledger, places: Places, start_watch: Start
) -> None:
    port = free_port()
    start_watch("--listen", f"127.0.0.1:{port}", CUTFLEET_WATCH_TOKEN=TOKEN)
    wait_until(lambda: is_listening(port), what="the watch listens")

    def post(body: bytes, token: str = TOKEN) -> int:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/events", data=body, headers={"Authorization": f"Bearer {token}"}
        )
        try:
            with urllib.request.urlopen(request) as answer:  # noqa: S310
                return int(answer.status)
        except urllib.error.HTTPError as exc:
            with exc:
                return exc.code

    event = put_event(places, "a.jpg", "e").encode()
    assert post(event, token="wrong") == post(event, token="é") == 401
    assert post(b"{}") == post(b"[" * 100_000) == post(event.replace(b"1024", b"1e999")) == 400
    assert post(b" " * 4_000_001) == 413
    assert total(ledger, places) == 0
    assert post(event) == 200
    assert total(ledger, places) == 1


def test_a_missing_queue_is_named(cutfleet: Run, places: Places, sqs: Any, queue: str) -> None:
    ran = cutfleet("watch", places.source, "--to", places.to, "--queue", queue + "-not")

    assert ran.returncode == 2
    assert "There is no SQS queue" in ran.stderr
    assert "[no_queue]" in ran.stderr
