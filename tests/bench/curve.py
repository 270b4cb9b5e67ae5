"""Whether one dispatcher keeps a fleet fed: throughput against the number of workers, and where it bends.

    python -m tests.bench.curve [--workers N] ... [--seconds S] [--json FILE]

Real Valkey, ledger, dispatcher and messages. A worker is an H100 at a tenth of its pace: 9 images a second, in
batches of 8, 24 slots; two processes play all of them, and their store is a folder. `fed`: the share of what the
workers could have done. Processor time tells who reaches the end of a core first.
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

from jobs.ledger import Claim, Ledger
from jobs.recipe import Recipe
from producer.demo.local_stack import LocalStack
from producer.submission.submit import Request, submit
from tests.bench.flow import cpu_s, valkey_alone
from tests.bench.report import Row, fact, progress, tell
from tests.bench.scale import run_dispatcher
from tests.bench.simulated import DESTINATION, MODEL, SOURCE, Consumer, FolderStore, say_alive

PACE = 9.0
"""Images a second of a worker: an H100's 90, at 1:10."""
BATCH = 8
SLOTS = 24
WORKERS = (8, 16, 32, 64, 128, 256, 512)
PLAYERS = 2
WAKE_S = 0.02
"""A player that wakes up later than this has let its device wait."""
RAMP_S = 4.0
"""Until every worker holds what it can: not counted."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, action="append", help=f"default: {' '.join(map(str, WORKERS))}")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each number of workers")
    tell(parser, measure)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    for count in options.workers or WORKERS:
        with valkey_alone() as stack:
            yield from _point(stack, stack.folder / "store", count, options.seconds)


def _point(stack: LocalStack, folder: Path, count: int, seconds: float) -> Iterator[Row]:
    url, most = stack.environment["CUTFLEET_REDIS_URL"], count * PACE
    context = multiprocessing.get_context("spawn")
    told: SimpleQueue[int] = context.SimpleQueue()
    stop = context.Event()
    players = [context.Process(target=_play, args=(url, count, first, stop, told)) for first in range(PLAYERS)]
    dispatcher = context.Process(target=run_dispatcher, args=(url, str(folder), stop))
    with stack.ledger() as ledger:
        _submit(ledger, FolderStore(folder, int(most * (2 * RAMP_S + seconds)) + count * SLOTS))
        for process in (dispatcher, *players):
            process.start()
        try:
            while ledger.jobs()[0].done < count * BATCH:
                time.sleep(0.05)
            time.sleep(RAMP_S)
            assert stack.valkey is not None
            pids = {"Valkey": stack.valkey.pid, "dispatcher": int(dispatcher.pid or 0)}
            began, before, cpu = (
                time.monotonic(),
                ledger.jobs()[0].done,
                {name: cpu_s(pid) for name, pid in pids.items()},
            )
            time.sleep(seconds)
            took, job = time.monotonic() - began, ledger.jobs()[0]
            busy = {name: (cpu_s(pid) - cpu[name]) / took for name, pid in pids.items()}
            assert job.open, "the job was over too soon"
        finally:
            stop.set()
            late = [told.get() for _ in players]
            for process in (*players, dispatcher):
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
    say_alive(ledger, node="worker0", slots=SLOTS)  # else nobody would know the model
    submit(request, store=store, ledger=ledger, lease_s=60, listed=lambda _: None)


def _play(url: str, count: int, first: int, stop: Any, told: SimpleQueue[int]) -> None:
    """Every `PLAYERS`th worker from `first` on; finishes a batch when its device would, and takes as many again."""
    short = 0
    with Ledger(url, name="curve") as ledger:
        consumer = Consumer(url)
        mine = range(first, count, PLAYERS)
        for number in mine:
            say_alive(ledger, node=f"worker{number}", slots=SLOTS)
        held: dict[int, list[Claim]] = {number: [] for number in mine}
        now = time.monotonic()
        due = [(now + number / count * BATCH / PACE, number) for number in mine]
        heapq.heapify(due)
        while not stop.is_set():
            at, number = due[0]
            time.sleep(max(0.0, at - time.monotonic()))
            batch, held[number] = held[number][:BATCH], held[number][BATCH:]
            consumer.finish(batch)
            wanted = SLOTS - len(held[number])
            taken = consumer.take(wanted)
            held[number] += taken
            short += len(held[number]) < BATCH
            heapq.heapreplace(due, (max(at, time.monotonic() - WAKE_S) + BATCH / PACE, number))
        consumer.close()
    told.put(short)


if __name__ == "__main__":
    main()
