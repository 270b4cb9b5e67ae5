"""Throughput against the number of worker processes on this machine, and processor time of the queue per image.

    python -m tests.bench.processes [--rounds N] [--most 3] [--json FILE]

2-megapixel images, edges off, a device that costs nothing. The last rows estimate the limit of Valkey and of the
dispatcher: each runs on one core, with 1000 ms of processor time per second, if an image costs under load what it costs
fleet. The estimate is conservative: the busier they are, the more images each turn handles.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator

from jobs.recipe import Recipe
from tests.bench.flow import Flow, run_fleet
from tests.bench.image_path import SIZES, make_photo
from tests.bench.report import Row, fact, progress, row, run_benchmark
from tests.bench.worker import SLOTS, start_stand_in

IMAGES = 240
SINGLE_CORE = {"broker": "Valkey", "dispatcher": "the dispatcher"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most", type=int, default=3, metavar="WORKERS")
    run_benchmark(parser, measure)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    flows: dict[int, list[Flow]] = {}
    with run_fleet() as fleet:
        fleet.upload("flood", IMAGES, make_photo(*SIZES["2 MP"]))
        counts = range(1, options.most + 1)
        fleets = {}
        for count in counts:
            started = [
                start_stand_in(fleet, count / 1000, node=f"of-{count}-{number}", slots=str(max(1, SLOTS // count)))
                for number in range(count)
            ]
            fleets[count] = [worker for worker, _ in started], started[0][1]
        for turn in range(options.rounds):
            for count, (workers, model) in fleets.items():
                flow = fleet.run("flood", Recipe(model=model, edges="off"), workers, slots=SLOTS)
                flows.setdefault(count, []).append(flow)
            progress(f"round {turn + 1}: " + ", ".join(f"{n}: {f[-1].rate:.1f}/s" for n, f in flows.items()))
    yield from _rows(flows)


def _rows(flows: dict[int, list[Flow]]) -> Iterator[Row]:
    single = [flow.rate for flow in flows[1]]
    for count, measured in flows.items():
        rates = [flow.rate for flow in measured]
        name = f"{count} worker process{'es' if count > 1 else ''}, {SLOTS} slots together"
        others = single if count > 1 else []
        yield row(name, rates, "images/s", against="one process" if others else "", others=others, better="more")
        yield row(f"{name}: all workers", [flow.cpu_ms["worker"] for flow in measured], "CPU ms/image")
    every = [flow for measured in flows.values() for flow in measured]
    for process, name in SINGLE_CORE.items():
        times = [flow.cpu_ms[process] for flow in every]
        yield row(f"queue, {name}", times, "CPU ms/image")
        yield fact(f"limit of {name} on one core", 1000 / statistics.median(times), "images/s")


if __name__ == "__main__":
    main()
