"""Celery and kombu without our ledger and patches: shows that the fault tests can fail, and when a patch is no longer
needed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from producer.demo.local_stack import Process, inherited_environment
from tests.faults.broker import count_waiting_workers
from tests.faults.fleet import Fleet
from tests.faults.plain_celery import make_plain_app
from tests.support.environment import ROOT
from tests.support.waiting import wait_until

DATABASE = 5
MESSAGES = 6


class PlainCelery:
    """Workers of `plain_celery.py`, and what they did, in a Redis database of their own."""

    def __init__(self, fleet: Fleet, folder: Path) -> None:
        self.url = f"redis://127.0.0.1:{fleet.stack.redis_port}/{DATABASE}"
        self.redis = redis.Redis.from_url(self.url, decode_responses=True)
        self._log = folder / "plain.log"
        self._workers: list[Process] = []

    def start(self, *args: str) -> Process:
        command = [sys.executable, str(ROOT / "tests" / "faults" / "plain_celery.py"), self.url, *args]
        worker = Process(command, log=self._log, env=inherited_environment() | {"PYTHONPATH": str(ROOT)})
        self._workers.append(worker)
        return worker

    def push(self, count: int, *, seconds: float = 0.0) -> None:
        app, work = make_plain_app(self.url)
        for number in range(count):
            work.delay(number, seconds)
        app.close()

    def count_done(self) -> int:
        return len(self.redis.keys("done:*"))

    def is_idle(self) -> bool:
        """Whether every message is acknowledged and one worker waits for another."""
        return not self.redis.exists("celery", "unacked") and count_waiting_workers(self.redis, db=DATABASE) == 1

    def stop(self) -> None:
        for worker in self._workers:
            worker.kill()
        self.redis.flushdb()
        self.redis.close()


@pytest.fixture
def plain(fleet: Fleet, tmp_path: Path) -> Iterator[PlainCelery]:
    plain = PlainCelery(fleet, tmp_path)
    yield plain
    plain.stop()


def test_plain_celery_loses_a_message_that_a_frozen_worker_took(plain: PlainCelery) -> None:
    """As in `test_a_message_that_a_frozen_worker_took_before_it_was_killed_is_published_again`."""
    frozen = plain.start("60")
    plain.push(1)
    wait_until(lambda: plain.count_done() == 1, what=f"the first message is done: {frozen.log_tail()}")
    wait_until(plain.is_idle)
    os.kill(frozen.pid, signal.SIGSTOP)
    plain.redis.delete("done:0")

    plain.push(MESSAGES)
    wait_until(lambda: plain.redis.llen("celery") < MESSAGES)
    frozen.kill()
    plain.start()

    wait_until(lambda: not plain.redis.exists("celery", "unacked") and plain.count_done() == MESSAGES - 1)
    assert plain.count_done() == MESSAGES - 1, "one message is lost"


def test_unpatched_kombu_ends_a_worker_that_loses_its_connection_with_an_unacknowledged_message(
    fleet: Fleet, plain: PlainCelery
) -> None:
    """When this fails, kombu no longer needs `_connparams` of `workers.process.kombu_patches.Channel`: remove it."""
    worker = plain.start("60")  # always within BRPOP
    plain.push(1, seconds=10)
    wait_until(lambda: plain.redis.exists("begun:0") == 1, what=worker.log_tail())
    wait_until(lambda: plain.redis.hlen("unacked") == 1 and count_waiting_workers(plain.redis, db=DATABASE) == 1)

    assert fleet.stack.valkey is not None
    fleet.stack.valkey.kill()
    fleet.stack.start_valkey()

    wait_until(lambda: worker.poll() is not None, what=f"the worker ends: {worker.log_tail()}")
    assert worker.poll() == 1
    assert "has no attribute 'hostname'" in worker.log.read_text(errors="replace")
