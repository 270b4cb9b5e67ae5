"""A fleet for harming: servers, dispatchers and stand-in workers of one test file, supervised as systemd would."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import redis
from numpy.typing import NDArray

from jobs.ledger import Ledger
from jobs.message import Lane
from jobs.recipe import Recipe
from jobs.s3.client import Location, Store
from producer.demo.local_stack import LocalStack, inherited_environment
from producer.submission.submit import Request, submit
from tests.faults.terms import MODEL
from tests.support.factories import Places, wait_until
from tests.support.systemd_unit import Unit

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
IMAGES = 24
LEASE_S = 2.0
UNHURRIED_S = "20"
"""A lease where nobody dies and each image is to be begun once, though the machine stands still for a moment."""
SETTINGS = {"lease_s": str(LEASE_S), "retry_base_s": "0.2", "drain_s": "10"}
_numbers = itertools.count()

Submit = Callable[..., str]
Reference = dict[str, NDArray[np.uint8]]


class Zygote:
    """`standin.py`, once for the whole run: it has imported everything and forks a worker when told to."""

    def __init__(self, folder: Path, env: Mapping[str, str] | None = None) -> None:
        self.ended: dict[int, int] = {}
        """Exit codes by process id, in order of their ends; negative: the signal that killed."""
        self._started: list[int] = []
        self._changed = threading.Condition()
        self._one_by_one = threading.Lock()
        with (folder / "zygote.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "standin.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=inherited_environment() | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"} | dict(env or {}),
                cwd=ROOT,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def fork(self, env: Mapping[str, str], log: Path, command: Sequence[str] = ()) -> int:
        """`command`: what `cutfleet` is told; nothing: it is a worker."""
        assert self._process.stdin is not None
        with self._one_by_one, self._changed:
            known = len(self._started)
            request = {"env": dict(env), "log": str(log), "command": list(command)}
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            assert self._changed.wait_for(lambda: len(self._started) > known, timeout=180), "no worker was forked"
            return self._started[known]

    def stop(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._reader.join(20)
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            facts = json.loads(line)
            with self._changed:
                if "started" in facts:
                    self._started.append(facts["started"])
                elif "ended" in facts:
                    self.ended[facts["ended"]] = facts["code"]
                self._changed.notify_all()


class Forks:
    """Processes of one kind, forked for one stack. A supervised one that ends is started again with the settings it
    had, or stays failed, as its systemd unit says."""

    unit = Unit("cutfleet-worker@.service")
    command: tuple[str, ...] = ()
    """What `cutfleet` is told; nothing: it is a worker."""

    def __init__(self, stack: LocalStack, zygote: Zygote, log: str) -> None:
        self._stack = stack
        self._zygote = zygote
        self._log = stack.folder / "logs" / log
        self._pids: list[int] = []
        self._supervised: dict[int, dict[str, str]] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)
        self._supervisor.start()

    def start(self, *, supervised: bool = False, s3_user: str = "", **settings: str) -> int:
        """Returns the process id. Settings as for `LocalStack`. `s3_user`: another than the stack's own."""
        env = self._stack.environment | ({"AWS_ACCESS_KEY_ID": s3_user} if s3_user else {})
        env |= {f"CUTFLEET_{name.upper()}": text for name, text in (SETTINGS | settings).items()}
        with self._lock:
            pid = self._fork(env)
            if supervised:
                self._supervised[pid] = env
        return pid

    def alive(self) -> list[int]:
        return [pid for pid in list(self._pids) if pid not in self._zygote.ended]

    def ends(self) -> dict[int, int]:
        """Exit codes of those that ended, by process id; negative: the signal that killed."""
        return {pid: code for pid, code in list(self._zygote.ended.items()) if pid in self._pids}

    def wait_for(self, pid: int, *, within_s: float = 60) -> int:
        wait_until(lambda: pid in self._zygote.ended, within_s=within_s, what=f"{pid} ends: {self.words()}")
        return self._zygote.ended[pid]

    def restart(self, pid: int) -> int:
        """`systemctl restart` of a supervised one: it is asked, killed when its time to stop is over, and another is
        started in its place. Returns its exit code."""
        os.kill(pid, signal.SIGTERM)
        try:
            return self.wait_for(pid, within_s=self.unit.stop_s)
        except AssertionError:
            self.kill(pid)
            raise

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        self.wait_for(pid)

    def words(self) -> str:
        return self._log.read_text(errors="replace")[-3000:] if self._log.exists() else ""

    def text(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def dismiss(self, number: int = signal.SIGTERM) -> list[int]:
        """Sends all of them away, none started again. Returns the exit codes."""
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
        self.dismiss(signal.SIGKILL)

    def _fork(self, env: Mapping[str, str]) -> int:
        pid = self._zygote.fork(env, self._log, self.command)
        self._pids.append(pid)
        return pid

    def _supervise(self) -> None:
        while not self._stopping.wait(0.05):
            with self._lock:
                for pid in [pid for pid in self._supervised if pid in self._zygote.ended]:
                    env = self._supervised.pop(pid)
                    if self.unit.starts_again_after(self._zygote.ended[pid]):
                        self._supervised[self._fork(env)] = env


class Workers(Forks):
    """Stand-in workers, each with a name of its own."""

    def start(self, *, supervised: bool = False, ready: bool = True, **settings: str) -> int:
        """With `ready`, returns when the worker says in the ledger that it is."""
        pid = super().start(
            supervised=supervised, **{"node": f"w{os.getpid()}-{next(_numbers)}", "slots": "4"} | settings
        )
        if ready:
            with self._stack.ledger() as ledger:
                wait_until(lambda: is_ready(ledger, pid), what=f"worker {pid} is ready: {self.words()}")
        return pid

    def published(self, places: Places) -> Counter[str]:
        """How often a cutout was written, by its s3:// name."""
        return Counter(re.findall(rf"^published ({re.escape(places.to)}.*)$", self.text(), re.M))

    def are_idle(self) -> bool:
        """Each says so in the ledger."""
        with self._stack.ledger() as ledger:
            said = [facts.get("in_flight") for facts in ledger.workers().values()]
        return len(said) == len(self.alive()) and set(said) == {"0"}

    def begun(self, job: str) -> Counter[str]:
        """How often an image of the job was claimed."""
        return Counter(re.findall(rf"^claimed ({re.escape(job)}:\d+)$", self.text(), re.M))


class Dispatchers(Forks):
    unit = Unit("cutfleet-dispatcher.service")
    command = ("dispatch",)


class Submits(Forks):
    """`cutfleet submit` as a fork, for its failpoints."""

    def start_for(self, places: Places, *more: str, **settings: str) -> int:
        self.command = ("submit", places.source, "--to", places.to, "--model", MODEL, *more)
        return self.start(**settings)


class Fleet:
    """One stack, its dispatchers and workers, on demand."""

    def __init__(self, folder: Path, zygote: Zygote) -> None:
        self.stack = LocalStack(folder)
        self.zygote = zygote

    def __enter__(self) -> Self:
        self.stack.__enter__()
        self.workers = Workers(self.stack, self.zygote, "workers.log")
        self.dispatchers = Dispatchers(self.stack, self.zygote, "dispatchers.log")
        self.submits = Submits(self.stack, self.zygote, "submits.log")
        self.ledger: Ledger = self.stack.ledger()
        self.store: Store = self.stack.store()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.workers.stop()
        self.dispatchers.stop()
        self.submits.stop()
        self.ledger.close()
        self.store.close()
        self.stack.stop()

    @contextlib.contextmanager
    def dispatcher(self, **settings: str) -> Iterator[int]:
        """A supervised one, by its process id at first."""
        yield self.dispatchers.start(supervised=True, **settings)
        self.dispatchers.dismiss()

    def forget(self) -> None:
        """Whatever a test that failed has left running."""
        for forks in (self.workers, self.dispatchers, self.submits):
            forks.dismiss(signal.SIGKILL)

    def active(self) -> int:
        """The fencing token of the dispatcher that is active, 0 when none is."""
        with redis.Redis(port=self.stack.redis_port, decode_responses=True) as client:
            return int(client.get("cf:dispatcher:epoch") or 0) if client.exists("cf:dispatcher") else 0

    def let_dispatcher_turn(self, times: int) -> None:
        """Waits until the active dispatcher, which renews its lock at each turn, has made so many."""
        made, last = 0, 0
        with redis.Redis(port=self.stack.redis_port) as client:

            def has_turned() -> bool:
                nonlocal made, last
                left = client.pttl("cf:dispatcher")
                made, last = made + (left > last > 0), left
                return made >= times

            wait_until(has_turned, what="the dispatcher makes its turns")

    def run(self, *args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """The `cutfleet` command."""
        return subprocess.run(
            [sys.executable, "-m", "producer", *args],
            env=inherited_environment() | self.stack.environment | (env or {}),
            capture_output=True,
            text=True,
            timeout=60,
            cwd=ROOT,
            check=False,
        )


def listening(client: redis.Redis, *, db: int = 0) -> int:
    """How many workers wait in BRPOP: the server hands a message to one of them whatever its process does."""
    return sum(
        found["db"] == str(db) and found["cmd"] == "brpop" and "b" in found["flags"] for found in client.client_list()
    )


def came_back(broker: redis.Redis) -> bool:
    """Whether a message that a worker holds was delivered before: kombu marks it so."""
    held: list[str] = broker.hvals("unacked")  # type: ignore[assignment]  # the types cover asyncio too
    return any(json.loads(text)[0]["headers"].get("redelivered") for text in held)


def is_stopped(pid: int) -> bool:
    """By SIGSTOP."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def children(pid: int, command: str = "") -> list[int]:
    """Processes that `pid` started and that live, with `command` in their command line."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, parent = stat.read_text().rpartition(")")[2].split()[:2]
            line = stat.with_name("cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == pid and command.encode() in line:
            found.append(int(stat.parent.name))
    return found


def is_ready(ledger: Ledger, pid: int) -> bool:
    return any(facts.get("pid") == str(pid) for facts in ledger.workers().values())


def make_places(fleet: Fleet) -> Places:
    number = next(_numbers)
    places = Places(f"s3://source-{os.getpid()}-{number}/", f"s3://results-{os.getpid()}-{number}/")
    for uri in (places.source, places.to):
        fleet.store.create_bucket(Location.parse(uri).bucket)
    return places


def submit_to(fleet: Fleet, places: Places, *more: str) -> str:
    """Submits everything under the source; returns the job's id."""
    ran = fleet.run("submit", places.source, "--to", places.to, "--model", MODEL, *more)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def submit_here(fleet: Fleet, places: Places, *keys: str, lane: Lane) -> str:
    """As `submit_to`, without a process of its own; no keys: everything under the source."""
    request = Request(
        source=places.source, destination=places.to, recipe=Recipe(model=MODEL), lane=lane, name="", keys=keys or None
    )
    return submit(request, store=fleet.store, ledger=fleet.ledger, lease_s=LEASE_S, listed=lambda _: None).id
