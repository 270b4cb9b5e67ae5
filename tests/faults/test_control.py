"""What Celery and kombu do by themselves: it shows that these tests can fail, and when our transport is not needed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from producer.demo.local_stack import Process, inherited_environment
from tests.faults.fleet import ROOT, Fleet, listening
from tests.faults.plain import make_plain
from tests.support.factories import wait_until

URL_DB = 5
PUSHED = 6


class Plain:
    """Workers of the control and what they did, in a database of their own."""

    def __init__(self, fleet: Fleet, folder: Path) -> None:
        self.url = f"redis://127.0.0.1:{fleet.stack.redis_port}/{URL_DB}"
        self.redis = redis.Redis.from_url(self.url, decode_responses=True)
        self._log = folder / "plain.log"
        self._workers: list[Process] = []

    def start(self, *more: str) -> Process:
        command = [sys.executable, str(ROOT / "tests" / "faults" / "plain.py"), self.url, *more]
        worker = Process(command, log=self._log, env=inherited_environment() | {"PYTHONPATH": str(ROOT)})
        self._workers.append(worker)
        return worker

    def push(self, count: int, *, seconds: float = 0.0) -> None:
        app, work = make_plain(self.url)
        for number in range(count):
            work.delay(number, seconds)
        app.close()

    def done(self) -> int:
        return len(self.redis.keys("done:*"))

    def is_idle(self) -> bool:
        """Everything is acknowledged, and one worker waits for more."""
        return not self.redis.exists("celery", "unacked") and listening(self.redis, db=URL_DB) == 1

    def stop(self) -> None:
        for worker in self._workers:
            worker.kill()
        self.redis.flushdb()
        self.redis.close()


@pytest.fixture
def plain(fleet: Fleet, tmp_path: Path) -> Iterator[Plain]:
    plain = Plain(fleet, tmp_path)
    yield plain
    plain.stop()


def test_plain_celery_loses_messages_where_we_lose_none(plain: Plain) -> None:
    """The same as `test_an_idle_worker_that_is_frozen_and_killed_takes_no_message_with_it`."""
    frozen = plain.start("60")
    plain.push(1)
    wait_until(lambda: plain.done() == 1, what=f"it works: {frozen.last_words()}")
    wait_until(plain.is_idle)
    os.kill(frozen.pid, signal.SIGSTOP)
    plain.redis.delete("done:0")

    plain.push(PUSHED)
    wait_until(lambda: plain.redis.llen("celery") < PUSHED)
    frozen.kill()
    plain.start()

    wait_until(lambda: not plain.redis.exists("celery", "unacked") and plain.done() == PUSHED - 1)
    assert plain.done() == PUSHED - 1, "one message left the list and is nowhere"


def test_stock_transport_ends_a_worker_that_loses_its_connection_with_a_message_in_flight(
    fleet: Fleet, plain: Plain
) -> None:
    """When this fails, kombu no longer needs `workers.process.kombu_patches.Transport._connparams`: take that part out."""
    worker = plain.start("60")  # it is within BRPOP whenever its server goes
    plain.push(1, seconds=10)
    wait_until(lambda: plain.redis.exists("begun:0") == 1, what=worker.last_words())
    wait_until(lambda: plain.redis.hlen("unacked") == 1 and listening(plain.redis, db=URL_DB) == 1)

    assert fleet.stack.valkey is not None
    fleet.stack.valkey.kill()
    fleet.stack.start_valkey()

    wait_until(lambda: worker.poll() is not None, what=f"it ends: {worker.last_words()}")
    assert worker.poll() == 1
    assert "has no attribute 'hostname'" in worker.log.read_text(errors="replace")
