"""A Valkey with TLS and one user for each role: everything works, and a role is refused what its ACL does not allow."""

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
from tests.faults.fleet import Fleet
from tests.faults.wire import Wire
from tests.support.environment import ROOT
from tests.support.flower import Flower
from tests.support.images import put_images
from tests.support.places import Places
from tests.support.waiting import wait_until

EXIT_UNREACHABLE = 4
SOME = 16
AWAY_S = 6.0
"""Longer than a lease and than the timeout of clients."""
ROLES = ("producer", "dispatcher", "worker", "flower")
PAGES = ("/workers", "/tasks", "/broker", "/api/workers?refresh=1", "/api/tasks", "/api/queues/length", "/metrics")


class SecuredValkey:
    """A server with users, and the URL of each role. The wheel's Valkey has no TLS: the test's proxy terminates it."""

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
    """Return the command lines of all processes, which every user of the machine may read."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            found.append(path.read_text(errors="replace"))
    return found


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[SecuredValkey]:
    valkey = SecuredValkey(tmp_path)
    with valkey.wire:
        wait_until(lambda: is_up(valkey.redis), what=valkey.server.log_tail())
        yield valkey
    valkey.redis.close()
    valkey.server.stop()


def is_up(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def test_every_role_works_over_tls_with_the_rights_of_its_acl(
    fleet: Fleet, places: Places, valkey: SecuredValkey
) -> None:
    put_images(fleet.store, places, 4)
    with Ledger(valkey.url("producer"), name="secured") as ledger:
        fleet.workers.fork(redis_url=valkey.url("worker"))
        fleet.dispatchers.start(redis_url=valkey.url("dispatcher"))
        flower = Flower(fleet.stack, more={"CUTFLEET_REDIS_URL": valkey.url("flower")})
        env = {"CUTFLEET_REDIS_URL": valkey.url("producer")}
        try:
            wait_until(lambda: bool(ledger.fleet.workers()), what=fleet.workers.log_tail())
            wait_until(flower.is_up, what=flower.process.log_tail())
            for lane in ("backfill", "live"):
                more = ("--to", f"{places.to}{lane}/", "--model", "stand-in", "--lane", lane, "--wait")
                ran = fleet.run("submit", places.source, *more, env=env)
                assert ran.returncode == 0, (ran.stderr, valkey.denied())
                job = ran.stdout.split()[0]
                assert ledger.jobs.get(job).done == 4
            assert fleet.run("status", job, env=env).returncode == 0
            wait_until(lambda: bool(flower.workers()), what="Flower shows the worker")
            shown = [flower.ask(page) for page in (*PAGES, *(f"/worker/{name}" for name in flower.workers()))]
            arguments = command_lines()
        finally:
            flower.process.stop()
    assert {status for status, _ in shown} == {200}
    logs = [path.read_text() for path in (fleet.stack.folder / "logs").glob("*.log")]
    texts = [*(text for _, text in shown), *logs, *arguments]
    assert not [text for text in texts for role in ROLES if f"change-{role}" in text], "a password is shown"
    assert any("producer.flower" in text for text in arguments)
    assert set(fleet.workers.terminate() + fleet.dispatchers.terminate()) == {0}
    assert valkey.denied() == []


def test_half_open_tls_connections_lose_no_image(fleet: Fleet, places: Places, valkey: SecuredValkey) -> None:
    """Both a request that waits for its answer and a worker that waits for a message."""
    put_images(fleet.store, places, SOME)
    with Ledger(valkey.url("producer"), name="secured") as ledger:
        worker = fleet.workers.fork(redis_url=valkey.url("worker"), test_device_ms="100")
        fleet.dispatchers.start(redis_url=valkey.url("dispatcher"))
        wait_until(lambda: bool(ledger.fleet.workers()), what=fleet.workers.log_tail())
        env = {"CUTFLEET_REDIS_URL": valkey.url("producer")}
        ran = fleet.run("submit", places.source, "--to", places.to, "--model", "stand-in", env=env)
        assert ran.returncode == 0, ran.stderr
        key = f"cf:job:{ran.stdout.strip()}"
        wait_until(lambda: int(valkey.redis.hget(key, "done") or 0) > 2, what=fleet.workers.log_tail())

        valkey.wire.swallow()
        began = time.monotonic()
        wait_until(lambda: time.monotonic() > began + AWAY_S, what="the connections were half-open for long enough")
        valkey.wire.heal()

        wait_until(lambda: valkey.redis.hexists(key, "closed"), within_s=100, what=fleet.workers.log_tail())
    assert int(valkey.redis.hget(key, "done") or 0) == SOME
    assert fleet.workers.alive() == [worker]
    assert set(fleet.workers.terminate() + fleet.dispatchers.terminate()) == {0}


@pytest.mark.parametrize(
    ("role", "command"),
    [
        ("producer", ("BRPOP", "live.u2netp", "1")),
        ("producer", ("HGETALL", "unacked")),
        ("dispatcher", ("HDEL", "unacked", "tag")),
        ("dispatcher", ("PUBLISH", "/0.celery.pidbox", "shutdown")),
        ("worker", ("FLUSHALL",)),
        ("worker", ("CONFIG", "GET", "*")),
        ("worker", ("GET", "another-key")),
        ("flower", ("HGETALL", "cf:job:1")),
        ("flower", ("LPUSH", "live.u2netp", "x")),
        ("flower", ("RPOP", "backfill.u2netp")),
        ("flower", ("ACL", "SETUSER", "flower", "allkeys")),
    ],
)
def test_each_role_is_refused_what_its_acl_does_not_allow(
    valkey: SecuredValkey, role: str, command: tuple[str, ...]
) -> None:
    with redis.Redis.from_url(valkey.url(role)) as client, pytest.raises(NoPermissionError):
        client.execute_command(*command)


def test_a_wrong_password_or_the_default_user_is_refused(valkey: SecuredValkey) -> None:
    for role, password in (("worker", "guess"), ("default", "x")):
        with redis.Redis.from_url(valkey.url(role, password)) as client, pytest.raises(AuthenticationError):
            client.ping()


@pytest.mark.parametrize("name", ["127.0.0.1", "elsewhere.example"], ids=["unknown_authority", "other_host_name"])
def test_no_password_is_sent_to_a_server_with_an_invalid_certificate(
    fleet: Fleet, valkey: SecuredValkey, name: str
) -> None:
    """Ledger and Celery refuse to connect, and a worker does not start."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    (trustme.CA() if name == "127.0.0.1" else valkey.authority).issue_cert(name).configure_cert(context)
    with Wire(valkey.port, tls=context) as impostor:
        url = valkey.url("worker").replace(f":{valkey.wire.port}/", f":{impostor.port}/")
        with (
            Ledger(url, name="impostor") as ledger,
            pytest.raises(ServiceUnavailable, match="CERTIFICATE_VERIFY") as raised,
        ):
            ledger.ping()
        with make_app(url).connection() as connection, pytest.raises(OperationalError, match="CERTIFICATE_VERIFY"):
            connection.ensure_connection(max_retries=1)
        worker = fleet.workers.fork(redis_url=url)
        assert fleet.workers.wait_for(worker) == EXIT_UNREACHABLE

    assert raised.value.code == "redis_unreachable"
    assert valkey.redis.info("clients")["connected_clients"] == 1
