"""What the benchmarks' own arithmetic claims; no timing is tested."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.bench.__main__ import find_losses, ratios_of
from tests.bench.report import TERMINATED, Row, from_json, row, to_json
from tests.support.factories import wait_until

ROOT = Path(__file__).parents[2]


def test_a_loss_of_more_than_a_tenth_is_named() -> None:
    before = [{"decode": 3.0, "resize": 5.0}, {"decode": 2.0, "resize": 5.2}, {"decode": 2.1}]

    losses = find_losses({"decode": 1.8, "resize": 4.6, "new": 1.0}, before)

    assert losses == {"decode": (1.8, 2.1)}


def test_a_ratio_says_how_many_times_better() -> None:
    cost = row("decode", [10, 20, 30], "ms", against="naive", others=[60])
    speed = row("worker", [10, 20, 30], "images/s", against="bare", others=[40], better="more")
    alone = row("edges", [5], "ms")

    assert (cost.ratio, speed.ratio, alone.ratio) == (3, 0.5, None)
    assert ratios_of({"images": [cost, alone]}) == {"images: decode, against naive": 3}


def test_rows_survive_json() -> None:
    rows: list[Row] = [row("decode", [1.0, 2.0], "ms", against="naive", others=[3.0])]

    assert from_json(json.dumps(to_json(rows))) == rows


def test_a_benchmark_that_is_told_to_go_leaves_no_server(tmp_path: Path) -> None:
    benchmark = subprocess.Popen(
        [sys.executable, "-m", "tests.bench", "queue"], cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)}
    )
    wait_until(lambda: len(servers_in(tmp_path)) == 1, what="Valkey runs")

    benchmark.terminate()

    assert benchmark.wait(60) == TERMINATED
    assert servers_in(tmp_path) == []


def servers_in(folder: Path) -> list[str]:
    """Process ids of servers whose data lies there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if path.readlink().is_relative_to(folder):
                found.append(path.parent.name)
    return found
