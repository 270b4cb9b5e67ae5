"""A benchmark stops the servers that it has started."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from tests.bench.report import TERMINATED
from tests.support.environment import ROOT
from tests.support.waiting import wait_until


def test_a_benchmark_that_gets_sigterm_stops_its_servers(tmp_path: Path) -> None:
    benchmark = subprocess.Popen(
        [sys.executable, "-m", "tests.bench", "queue"], cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)}
    )
    wait_until(lambda: len(servers_in(tmp_path)) == 1, what="Valkey has started")

    benchmark.terminate()

    assert benchmark.wait(60) == TERMINATED
    assert servers_in(tmp_path) == []


def servers_in(folder: Path) -> list[str]:
    """Return the ids of processes that run in `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):  # it has ended
            if path.readlink().is_relative_to(folder):
                found.append(path.parent.name)
    return found
