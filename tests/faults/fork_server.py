"""Forks stand-in workers and `cutfleet` commands from one process that has imported everything."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from producer.demo.local_stack import inherited_environment
from tests.support.environment import ROOT


class ForkServer:
    """The process of `stand_in_worker.py`, one for the whole test run."""

    def __init__(self, folder: Path, env: Mapping[str, str] | None = None) -> None:
        self.ended: dict[int, int] = {}
        """Exit codes by process id, in order of their ends; negative: the signal that killed the process."""
        self._started: list[int] = []
        self._changed = threading.Condition()
        self._one_by_one = threading.Lock()
        with (folder / "fork-server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("stand_in_worker.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=inherited_environment() | {"PYTHONPATH": str(ROOT)} | dict(env or {}),
                cwd=ROOT,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def fork(self, env: Mapping[str, str], log: Path, command: Sequence[str] = ()) -> int:
        """Return the process id. `command`: arguments of `cutfleet`; empty: a worker."""
        assert self._process.stdin is not None
        with self._one_by_one, self._changed:
            earlier = len(self._started)
            request = {"env": dict(env), "log": str(log), "command": list(command)}
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            assert self._changed.wait_for(lambda: len(self._started) > earlier, timeout=180), "no process was forked"
            return self._started[earlier]

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
            report = json.loads(line)
            with self._changed:
                if "started" in report:
                    self._started.append(report["started"])
                elif "ended" in report:
                    self.ended[report["ended"]] = report["code"]
                self._changed.notify_all()
