"""Whether one dispatcher feeds a whole fleet: throughput against the number of workers.

    python -m tests.bench.curve [--workers N] ... [--seconds S] [--json FILE]

Real Valkey, ledger, dispatcher and messages. A worker is simulated as a tenth of an H100: 9 images per second in
batches of 8, 24 slots. Two processes simulate all workers; their store is a folder. `fed`: share of what the workers
could have done. Processor time shows which process first needs a whole core.
"""

from __future__ import annotations

import argparse
import heapq
import multiprocessing
import time
from collections.abc import Iterator
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

from jobs.ledger import Ledger
from jobs.ledger.window import Claim
from jobs.recipe import Recipe
from producer.demo.local_stack import LocalStack
from producer.submission.request import Request
from producer.submission.submit import submit
from tests.bench.flow import cpu_s, run_valkey
from tests.bench.report import Row, fact, progress, run_benchmark
from tests.bench.scale import run_dispatcher
from tests.bench.simulated import DESTINATION, MODEL, SOURCE, Consumer, FolderStore, send_heartbeat

RATE = 9.0
"""Images per second of a worker: a tenth of an H100's 90."""
BATCH = 8
SLOTS = 24
WORKERS = (8, 16, 32, 64, 128, 256, 512)
SIMULATORS = 2
WAKE_S = 0.02
"""A simulator that wakes up later than this has kept its device waiting."""
RAMP_S = 4.0
"""Time until every slot is busy, which is not measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, action="append", help=f"default: {' '.join(map(str, WORKERS))}")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each number of workers")
    run_benchmark(parser, measure)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    for count in options.workers or WORKERS:
        with run_valkey() as stack:
            yield from _point(stack, stack.folder / "store", count, options.seconds)


def _point(stack: LocalStack, folder: Path, count: int, seconds: float) -> Iterator[Row]:
    url, most = stack.environment["CUTFLEET_REDIS_URL"], count * RATE
    context = multiprocessing.get_context("spawn")
    counts: SimpleQueue[int] = context.SimpleQueue()
    stop = context.Event()
    simulators = [
        context.Process(target=_simulate, args=(url, count, first, stop, counts)) for first in range(SIMULATORS)
    ]
    dispatcher = context.Process(target=run_dispatcher, args=(url, str(folder), stop))
    with stack.ledger() as ledger:
        _submit(ledger, FolderStore(folder, int(most * (2 * RAMP_S + seconds)) + count * SLOTS))
        for process in (dispatcher, *simulators):
            process.start()
        try:
            while ledger.jobs.newest()[0].done < count * BATCH:
                time.sleep(0.05)
            time.sleep(RAMP_S)
            assert stack.valkey is not None
            pids = {"Valkey": stack.valkey.pid, "dispatcher": int(dispatcher.pid or 0)}
            began, before, cpu = (
                time.monotonic(),
                ledger.jobs.newest()[0].done,
                {name: cpu_s(pid) for name, pid in pids.items()},
            )
            time.sleep(seconds)
            took, job = time.monotonic() - began, ledger.jobs.newest()[0]
            busy = {name: (cpu_s(pid) - cpu[name]) / took for name, pid in pids.items()}
            assert job.open, "the job ended too soon"
        finally:
            stop.set()
            late = [counts.get() for _ in simulators]
            for process in (*simulators, dispatcher):
                process.join()
    rate = (job.done - before) / took
    progress(f"{count} workers: {rate:.0f} of {most:.0f} images/s")
    yield fact(f"{count} workers, that can do {most:.0f} images/s", rate, "images/s")
    yield fact(f"{count} workers, fed", 100 * rate / most, "%")
    for name, share in busy.items():
        yield fact(f"{count} workers, {name}", 100 * share, "% of a core")
    yield fact(f"{count} workers, batches that did not find {BATCH} messages", sum(late), "")


def _submit(ledger: Ledger, store: FolderStore) -> None:
    request = Request(
        source=SOURCE, destination=DESTINATION, recipe=Recipe(model=MODEL), lane="backfill", name="curve", keys=None
    )
    send_heartbeat(ledger, node="worker0", slots=SLOTS)  # submissions require a worker for the model
    submit(request, store=store, ledger=ledger, lease_s=60, listed=lambda _: None)


def _simulate(url: str, count: int, first: int, stop: Any, counts: SimpleQueue[int]) -> None:
    """Simulate every `SIMULATORS`th worker from `first` on: finish a batch when the device would, and take as many new
    images."""
    short = 0
    with Ledger(url, name="curve") as ledger:
        consumer = Consumer(url)
        mine = range(first, count, SIMULATORS)
        for number in mine:
            send_heartbeat(ledger, node=f"worker{number}", slots=SLOTS)
        in_work: dict[int, list[Claim]] = {number: [] for number in mine}
        now = time.monotonic()
        due = [(now + number / count * BATCH / RATE, number) for number in mine]
        heapq.heapify(due)
        while not stop.is_set():
            at, number = due[0]
            time.sleep(max(0.0, at - time.monotonic()))
            batch, in_work[number] = in_work[number][:BATCH], in_work[number][BATCH:]
            consumer.finish(batch)
            free = SLOTS - len(in_work[number])
            taken = consumer.take(free)
            in_work[number] += taken
            short += len(in_work[number]) < BATCH
            heapq.heapreplace(due, (max(at, time.monotonic() - WAKE_S) + BATCH / RATE, number))
        consumer.close()
    counts.put(short)


if __name__ == "__main__":
    main()
