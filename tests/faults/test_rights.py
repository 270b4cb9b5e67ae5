"""A Valkey that speaks TLS only and knows a user for each role: all works, and each is refused what is not its."""

from __future__ import annotations

import contextlib
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import trustme
from kombu.exceptions import OperationalError
from redis.exceptions import AuthenticationError, NoPermissionError

from jobs.broker import make_app
from jobs.errors import ServiceUnavailable
from jobs.ledger import Ledger
from producer.demo.local_stack import Process, free_port, valkey_program
from tests.faults.fleet import ROOT, Fleet
from tests.faults.proxy import Wire
from tests.support.factories import Places, put_images, wait_until
from tests.support.flower import Flower

EXIT_UNREACHABLE = 4
SOME = 16
AWAY_S = 6.0
"""Longer than a lease and than clients wait for an answer."""
ROLES = ("producer", "dispatcher", "worker", "flower")
PAGES = ("/workers", "/tasks", "/broker", "/api/workers?refresh=1", "/api/tasks", "/api/queues/length", "/metrics")


class Guarded:
    """The server and the URL of each role. The wheel's Valkey has no TLS of its own: the test's proxy ends it."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        acl = (ROOT / "infra" / "redis" / "users.acl").read_text() + "user test on >test ~* &* +@all\n"
        (folder / "users.acl").write_text(acl)
        command = [valkey_program(), "--port", str(self.port), "--dir", str(folder), "--save", ""]
        command += ["--aclfile", str(folder / "users.acl")]
        self.server = Process(command, log=folder / "valkey.log", env={})
        self.authority = trustme.CA()
        self.authority.cert_pem.write_to_path(str(folder / "ca.pem"))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority.issue_cert("127.0.0.1").configure_cert(context)
        self._ca = folder / "ca.pem"
        self.wire = Wire(self.port, tls=context)
        self.redis = redis.Redis(port=self.port, username="test", password="test", decode_responses=True)

    def url(self, role: str, password: str = "") -> str:
        return (
            f"rediss://{role}:{password or f'change-{role}'}@127.0.0.1:{self.wire.port}/0"
            f"?ssl_cert_reqs=required&ssl_ca_certs={self._ca}"
        )

    def denied(self) -> list[str]:
        return [
            f"{row['username']}: {row['reason']} {row['object']} ({row['context']})" for row in self.redis.acl_log()
        ]


def command_lines() -> list[str]:
    """Of all processes: anybody on the machine may read them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended just now
            found.append(path.read_text(errors="replace"))
    return found


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    guarded = Guarded(tmp_path)
    with guarded.wire:
        wait_until(lambda: is_up(guarded.redis), what=guarded.server.last_words())
        yield guarded
    guarded.redis.close()
    guarded.server.stop()


def is_up(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def test_every_role_does_its_work_over_tls_with_its_own_rights(fleet: Fleet, places: Places, guarded: Guarded) -> None:
    put_images(fleet.store, places, 4)
    with Ledger(guarded.url("producer"), name="guarded") as ledger:
        fleet.workers.start(redis_url=guarded.url("worker"), ready=False)
        fleet.dispatchers.start(redis_url=guarded.url("dispatcher"))
        flower = Flower(fleet.stack, more={"CUTFLEET_REDIS_URL": guarded.url("flower")})
        env = {"CUTFLEET_REDIS_URL": guarded.url("producer")}
        try:
            wait_until(lambda: bool(ledger.workers()), what=fleet.workers.words())
            wait_until(flower.is_up, what=flower.process.last_words())
            for lane in ("backfill", "live"):
                more = ("--to", f"{places.to}{lane}/", "--model", "stand-in", "--lane", lane, "--wait")
                ran = fleet.run("submit", places.source, *more, env=env)
                assert ran.returncode == 0, (ran.stderr, guarded.denied())
                job = ran.stdout.split()[0]
                assert ledger.job(job).done == 4
            assert fleet.run("status", job, env=env).returncode == 0
            wait_until(lambda: bool(flower.workers()), what="Flower knows the worker")
            shown = [flower.ask(page) for page in (*PAGES, *(f"/worker/{name}" for name in flower.workers()))]
            arguments = command_lines()
        finally:
            flower.process.stop()
    assert {status for status, _ in shown} == {200}
    logs = [path.read_text() for path in (fleet.stack.folder / "logs").glob("*.log")]
    told = [*(text for _, text in shown), *logs, *arguments]
    assert not [text for text in told for role in ROLES if f"change-{role}" in text], "a password is shown"
    assert any("producer.flower" in text for text in arguments)
    assert set(fleet.workers.dismiss() + fleet.dispatchers.dismiss()) == {0}
    assert guarded.denied() == []


def test_a_connection_over_tls_that_is_half_open_for_a_while_costs_only_that(
    fleet: Fleet, places: Places, guarded: Guarded
) -> None:
    """Neither side hears of an end: what waits for an answer, and what waits for a message."""
    put_images(fleet.store, places, SOME)
    with Ledger(guarded.url("producer"), name="guarded") as ledger:
        worker = fleet.workers.start(redis_url=guarded.url("worker"), test_device_ms="100", ready=False)
        fleet.dispatchers.start(redis_url=guarded.url("dispatcher"))
        wait_until(lambda: bool(ledger.workers()), what=fleet.workers.words())
        env = {"CUTFLEET_REDIS_URL": guarded.url("producer")}
        ran = fleet.run("submit", places.source, "--to", places.to, "--model", "stand-in", env=env)
        assert ran.returncode == 0, ran.stderr
        key = f"cf:job:{ran.stdout.strip()}"
        wait_until(lambda: int(guarded.redis.hget(key, "done") or 0) > 2, what=fleet.workers.words())

        guarded.wire.swallow()
        began = time.monotonic()
        wait_until(lambda: time.monotonic() > began + AWAY_S)
        guarded.wire.heal()

        wait_until(lambda: guarded.redis.hexists(key, "closed"), within_s=100, what=fleet.workers.words())
    assert int(guarded.redis.hget(key, "done")) == SOME
    assert fleet.workers.alive() == [worker]
    assert set(fleet.workers.dismiss() + fleet.dispatchers.dismiss()) == {0}


@pytest.mark.parametrize(
    ("role", "command"),
    [
        ("producer", ("BRPOP", "live.u2netp", "1")),
        ("producer", ("HGETALL", "unacked")),
        ("dispatcher", ("HDEL", "unacked", "tag")),
        ("dispatcher", ("PUBLISH", "/0.celery.pidbox", "shutdown")),
        ("worker", ("FLUSHALL",)),
        ("worker", ("CONFIG", "GET", "*")),
        ("worker", ("GET", "somebody-elses")),
        ("flower", ("HGETALL", "cf:job:1")),
        ("flower", ("LPUSH", "live.u2netp", "x")),
        ("flower", ("RPOP", "backfill.u2netp")),
        ("flower", ("ACL", "SETUSER", "flower", "allkeys")),
    ],
)
def test_each_role_is_refused_what_is_not_its(guarded: Guarded, role: str, command: tuple[str, ...]) -> None:
    with redis.Redis.from_url(guarded.url(role)) as client, pytest.raises(NoPermissionError):
        client.execute_command(*command)


def test_nobody_comes_in_without_a_name_and_its_password(guarded: Guarded) -> None:
    for role, password in (("worker", "guess"), ("default", "x")):
        with redis.Redis.from_url(guarded.url(role, password)) as client, pytest.raises(AuthenticationError):
            client.ping()


@pytest.mark.parametrize("name", ["127.0.0.1", "elsewhere.example"], ids=["signed_by_a_stranger", "of_another_name"])
def test_a_server_that_can_not_prove_who_it_is_hears_no_password(fleet: Fleet, guarded: Guarded, name: str) -> None:
    """Neither by the ledger nor by Celery, and a worker does not start."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    (trustme.CA() if name == "127.0.0.1" else guarded.authority).issue_cert(name).configure_cert(context)
    with Wire(guarded.port, tls=context) as impostor:
        url = guarded.url("worker").replace(f":{guarded.wire.port}/", f":{impostor.port}/")
        with (
            Ledger(url, name="impostor") as ledger,
            pytest.raises(ServiceUnavailable, match="CERTIFICATE_VERIFY") as said,
        ):
            ledger.ping()
        with make_app(url).connection() as connection, pytest.raises(OperationalError, match="CERTIFICATE_VERIFY"):
            connection.ensure_connection(max_retries=1)
        worker = fleet.workers.start(redis_url=url, ready=False)
        assert fleet.workers.wait_for(worker) == EXIT_UNREACHABLE

    assert said.value.code == "redis_unreachable"
    assert guarded.redis.info("clients")["connected_clients"] == 1
