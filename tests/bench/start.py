"""How long a CPU worker takes to start, and how much of it are imports.

    python -m tests.bench.start [--rounds N] [--json FILE]

Ready: the model is loaded and warm, Redis and S3 answer, and the heartbeat is in the ledger. Imports: each package with
what it imports first, in its own process (`-X importtime`).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from producer.demo.local_stack import LocalStack
from tests.bench.flow import cpu_s
from tests.bench.report import Row, fact, row, run_benchmark

TASK_MODULE = "workers.tasks.task"
"""The module that a worker imports last; it imports nearly everything."""
PACKAGES = ("torch", "torchvision", "cv2", "celery", "kombu", "boto3", "botocore", "redis", "PIL", "numpy", "pydantic")
MIN_S = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    run_benchmark(parser, measure)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="cutfleet-bench-") as folder, LocalStack(Path(folder)) as stack:
        wall, cpu = zip(*(_start(stack) for _ in range(options.rounds)), strict=True)
    yield row("CPU worker with u2netp, start to ready", wall, "s")
    yield row("the same, processor time", cpu, "s")
    yield row("import workers", [_import_s("workers") for _ in range(options.rounds)], "s")
    times = _import_times(TASK_MODULE)
    yield fact(f"import {TASK_MODULE}", times[TASK_MODULE], "s")
    for name in sorted(PACKAGES, key=lambda name: -times.get(name, 0.0)):
        if times.get(name, 0.0) >= MIN_S:
            yield fact(f"of that, {name}", times[name], "s")


def _start(stack: LocalStack) -> tuple[float, float]:
    began = time.perf_counter()
    worker = stack.start_worker(device="cpu")
    wall, cpu = time.perf_counter() - began, cpu_s(worker.pid)
    worker.stop()
    return wall, cpu


def _import_s(module: str) -> float:
    return _import_times(module)[module]


def _import_times(module: str) -> dict[str, float]:
    """Return the seconds of each module, including what it imports."""
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", f"import {module}"], check=True, capture_output=True, text=True
    )
    fields = [line.removeprefix("import time:").split("|") for line in ran.stderr.splitlines() if "|" in line]
    return {name.strip(): int(both) / 1e6 for _, both, name in fields if both.strip().isdigit()}


if __name__ == "__main__":
    main()
