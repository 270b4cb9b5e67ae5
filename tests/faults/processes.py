"""Workers, dispatchers and submissions as forks of the fork server, supervised as systemd supervises them."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Mapping

from jobs.ledger import Ledger
from producer.demo.local_stack import LocalStack
from tests.faults.fork_server import ForkServer
from tests.faults.stand_in_settings import MODEL
from tests.support.places import Places
from tests.support.systemd_unit import Unit
from tests.support.waiting import wait_until

LEASE_S = 2.0
LONG_LEASE_S = "20"
"""Outlasts a pause of the whole machine, for tests in which no process dies and each image must be claimed once."""
SETTINGS = {"lease_s": str(LEASE_S), "retry_base_s": "0.2", "drain_s": "10"}
_numbers = itertools.count()


class ForkedProcesses:
    """Processes of one kind, for one stack. A supervised process that ends is started again with the same settings,
    unless its systemd unit forbids it for that exit code. Settings are named as in `LocalStack`; `s3_user` is another
    access key than the stack's."""

    unit = Unit("cutfleet-worker@.service")
    command: tuple[str, ...] = ()
    """Arguments of `cutfleet`; empty: a worker."""

    def __init__(self, stack: LocalStack, fork_server: ForkServer, log: str) -> None:
        self._stack = stack
        self._fork_server = fork_server
        self._log = stack.folder / "logs" / log
        self._pids: list[int] = []
        self._supervised: dict[int, dict[str, str]] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)
        self._supervisor.start()

    def fork(self, **settings: str) -> int:
        """Start a process; return its id at once."""
        return self._fork(self._environment(settings))

    def fork_supervised(self, **settings: str) -> int:
        env = self._environment(settings)
        with self._lock:
            pid = self._fork(env)
            self._supervised[pid] = env
        return pid

    def start(self, **settings: str) -> int:
        """Start a process; return its id when it is ready."""
        return self._when_ready(self.fork(**settings))

    def start_supervised(self, **settings: str) -> int:
        return self._when_ready(self.fork_supervised(**settings))

    def alive(self) -> list[int]:
        return [pid for pid in list(self._pids) if pid not in self._fork_server.ended]

    def exit_codes(self) -> dict[int, int]:
        """Return the exit codes of ended processes by process id; negative: the signal that killed the process."""
        return {pid: code for pid, code in list(self._fork_server.ended.items()) if pid in self._pids}

    def wait_for(self, pid: int, *, within_s: float = 60) -> int:
        """Wait until the process has ended; return its exit code."""
        wait_until(
            lambda: pid in self._fork_server.ended, within_s=within_s, what=f"{pid} has ended: {self.log_tail()}"
        )
        return self._fork_server.ended[pid]

    def restart(self, pid: int) -> int:
        """Restart a supervised process as `systemctl restart` does: SIGTERM, and SIGKILL after the unit's
        TimeoutStopSec. Return its exit code."""
        os.kill(pid, signal.SIGTERM)
        try:
            return self.wait_for(pid, within_s=self.unit.stop_s)
        except AssertionError:
            self.kill(pid)
            raise

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        self.wait_for(pid)

    def log_text(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def log_tail(self) -> str:
        return self.log_text()[-3000:]

    def terminate(self, number: int = signal.SIGTERM) -> list[int]:
        """Send a signal to every process and supervise none any more. Return the exit codes."""
        with self._lock:
            self._supervised.clear()
        pids = self.alive()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, number)
        return [self.wait_for(pid) for pid in pids]

    def stop(self) -> None:
        self._stopping.set()
        self._supervisor.join()
        self.terminate(signal.SIGKILL)

    def _defaults(self) -> dict[str, str]:
        return SETTINGS

    def _when_ready(self, pid: int) -> int:
        return pid

    def _environment(self, settings: Mapping[str, str]) -> dict[str, str]:
        given = self._defaults() | dict(settings)
        env = dict(self._stack.environment)
        if s3_user := given.pop("s3_user", ""):
            env["AWS_ACCESS_KEY_ID"] = s3_user
        return env | {f"CUTFLEET_{name.upper()}": text for name, text in given.items()}

    def _fork(self, env: Mapping[str, str]) -> int:
        pid = self._fork_server.fork(env, self._log, self.command)
        self._pids.append(pid)
        return pid

    def _supervise(self) -> None:
        while not self._stopping.wait(0.05):
            with self._lock:
                for pid in [pid for pid in self._supervised if pid in self._fork_server.ended]:
                    env = self._supervised.pop(pid)
                    if self.unit.restarts_after(self._fork_server.ended[pid]):
                        self._supervised[self._fork(env)] = env


class Workers(ForkedProcesses):
    """Stand-in workers, each with its own node name. A worker is ready when its heartbeat is in the ledger."""

    def publish_counts(self, places: Places) -> Counter[str]:
        """Return how often each cutout was written, by its s3:// name."""
        return Counter(re.findall(rf"^published ({re.escape(places.to)}.*)$", self.log_text(), re.M))

    def claim_counts(self, job: str) -> Counter[str]:
        """Return how often each image of the job was claimed."""
        return Counter(re.findall(rf"^claimed ({re.escape(job)}:\d+)$", self.log_text(), re.M))

    def are_idle(self) -> bool:
        """Whether every worker's heartbeat reports no image in flight."""
        with self._stack.ledger() as ledger:
            in_flight = [beat.get("in_flight") for beat in ledger.fleet.workers().values()]
        return len(in_flight) == len(self.alive()) and set(in_flight) == {"0"}

    def _defaults(self) -> dict[str, str]:
        return SETTINGS | {"node": f"w{os.getpid()}-{next(_numbers)}", "slots": "4"}

    def _when_ready(self, pid: int) -> int:
        with self._stack.ledger() as ledger:
            wait_until(lambda: is_ready(ledger, pid), what=f"worker {pid} is ready: {self.log_tail()}")
        return pid


class Dispatchers(ForkedProcesses):
    unit = Unit("cutfleet-dispatcher.service")
    command = ("dispatch",)


class Submissions(ForkedProcesses):
    """`cutfleet submit` as a fork, for its failpoints."""

    def start_for(self, places: Places, *options: str, **settings: str) -> int:
        self.command = ("submit", places.source, "--to", places.to, "--model", MODEL, *options)
        return self.start(**settings)


def is_ready(ledger: Ledger, pid: int) -> bool:
    return any(beat.get("pid") == str(pid) for beat in ledger.fleet.workers().values())
