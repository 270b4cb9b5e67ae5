"""The servers, dispatchers and stand-in workers of one test file, which its tests kill, freeze and disconnect."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self

import redis

from jobs.ledger import Ledger
from jobs.message import Lane
from jobs.recipe import Recipe
from jobs.s3.client import Store
from producer.demo.local_stack import LocalStack, inherited_environment
from producer.submission.request import Request
from producer.submission.submit import submit
from tests.faults.fork_server import ForkServer
from tests.faults.processes import LEASE_S, Dispatchers, Submissions, Workers
from tests.faults.stand_in_settings import MODEL
from tests.support.environment import ROOT
from tests.support.places import Places, create_places
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

IMAGES = 24
Submit = Callable[..., str]
"""The fixture `submit`: submits the test's source with these options and returns the job's id."""
Reference = dict[str, "NDArray[np.uint8]"]
"""Masks by image name, from a run without faults."""
_numbers = itertools.count()


class Fleet:
    """One stack with dispatchers and workers on demand."""

    def __init__(self, folder: Path, fork_server: ForkServer) -> None:
        self.stack = LocalStack(folder)
        self.fork_server = fork_server

    def __enter__(self) -> Self:
        self.stack.__enter__()
        self.workers = Workers(self.stack, self.fork_server, "workers.log")
        self.dispatchers = Dispatchers(self.stack, self.fork_server, "dispatchers.log")
        self.submissions = Submissions(self.stack, self.fork_server, "submissions.log")
        self.ledger: Ledger = self.stack.ledger()
        self.store: Store = self.stack.store()
        return self

    def __exit__(self, *_: object) -> None:
        for processes in (self.workers, self.dispatchers, self.submissions):
            processes.stop()
        self.ledger.close()
        self.store.close()
        self.stack.stop()

    @contextlib.contextmanager
    def dispatcher(self, **settings: str) -> Iterator[int]:
        """Supervise a dispatcher during the block; yield the id of its first process."""
        yield self.dispatchers.start_supervised(**settings)
        self.dispatchers.terminate()

    def kill_all(self) -> None:
        """Kill every process that a failed test has left."""
        for processes in (self.workers, self.dispatchers, self.submissions):
            processes.terminate(signal.SIGKILL)

    def active_epoch(self) -> int:
        """Return the fencing token of the active dispatcher; 0 when none is active."""
        with redis.Redis(port=self.stack.redis_port, decode_responses=True) as client:
            return int(client.get("cf:dispatcher:epoch") or 0) if client.exists("cf:dispatcher") else 0

    def wait_for_turns(self, turns: int) -> None:
        """Wait until the active dispatcher has made `turns` turns; it renews its lock at each."""
        made, last = 0, 0
        with redis.Redis(port=self.stack.redis_port) as client:

            def has_turned() -> bool:
                nonlocal made, last
                left = client.pttl("cf:dispatcher")
                made, last = made + (left > last > 0), left
                return bool(made >= turns)

            wait_until(has_turned, what=f"the dispatcher has made {turns} turns")

    def run(self, *args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run the `cutfleet` command."""
        return subprocess.run(
            [sys.executable, "-m", "producer", *args],
            env=inherited_environment() | self.stack.environment | (env or {}),
            capture_output=True,
            text=True,
            timeout=60,
            cwd=ROOT,
            check=False,
        )

    def create_places(self) -> Places:
        return create_places(self.store, f"{os.getpid()}-{next(_numbers)}")

    def submit(self, places: Places, *options: str) -> str:
        """Submit everything under the source with the command; return the job's id."""
        ran = self.run("submit", places.source, "--to", places.to, "--model", MODEL, *options)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.strip()

    def submit_in_process(self, places: Places, *keys: str, lane: Lane) -> str:
        """Submit as `submit` does, without a process of its own. No keys: everything under the source."""
        request = Request(
            source=places.source_location,
            destination=places.destination,
            recipe=Recipe(model=MODEL),
            lane=lane,
            name="",
            keys=keys or None,
        )
        return submit(request, store=self.store, ledger=self.ledger, lease_s=LEASE_S, listed=lambda _: None).id
