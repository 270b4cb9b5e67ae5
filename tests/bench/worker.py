"""A worker end to end, on cores that it shares with Valkey and SeaweedFS: with a device that costs nothing, against the
image path in one process without queue and store; with a device of 11 ms per image; with a device so slow that these
cores keep it busy; and with u2netp on the CPU.

    python -m tests.bench.worker [--rounds N] [--size 12MP] [--slots N] [--json FILE]

Edges are off. Beside the rates, the processor time of each process per image is shown, which can be compared between
machines.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from jobs.recipe import Recipe
from producer.demo.local_stack import Process
from tests.bench.flow import Fleet, Flow, run_fleet
from tests.bench.image_path import SIZES, make_photo
from tests.bench.report import Row, fact, progress, row, run_benchmark

IMAGES = {"12MP": 60, "2MP": 240}
MODEL_SHARE = 0.25
"""Share of the images for the rounds with u2netp, which takes a few hundred milliseconds per image."""
DEVICE_MS = 11.0
"""Planned time of BiRefNet on an H100."""
CORES = len(os.sched_getaffinity(0))
SLOTS = 2 * CORES
BATCH = 2
SLOTS_PER_BATCH_IMAGE = 3
"""As the default of a GPU worker, 24 slots and batches of 8: one batch on the device, one before it, one after it."""
SUFFICES_MS = {"12MP": 400 / CORES, "2MP": 100 / CORES}
"""The whole fleet with SeaweedFS takes some 220 and 55 ms of processor time per image: these cores are enough."""
FREE, BUSY, MODEL = "device of 0 ms", f"device of {DEVICE_MS:g} ms", "u2netp"
PROCESSES = ("worker", "store", "broker", "dispatcher")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", choices=IMAGES, action="append", help="default: all")
    parser.add_argument("--slots", type=int, default=SLOTS, help="images in flight, except with the slow device")
    run_benchmark(parser, measure)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    with run_fleet() as fleet:
        workers = {
            FREE: start_stand_in(fleet, 0, slots=str(options.slots)),
            BUSY: start_stand_in(fleet, DEVICE_MS, slots=str(options.slots)),
            MODEL: (fleet.stack.start_worker(slots=str(options.slots), device="cpu", node=MODEL), MODEL),
        }
        for size in options.size or IMAGES:
            slots = {"slots": str(SLOTS_PER_BATCH_IMAGE * BATCH), "batch_limit": str(BATCH)}
            slow = {slow_name(size): start_stand_in(fleet, SUFFICES_MS[size], **slots)}
            yield from _measure_size(fleet, size, workers | slow, rounds=options.rounds, slots=options.slots)


def slow_name(size: str) -> str:
    return f"device of {SUFFICES_MS[size]:g} ms"


def start_stand_in(fleet: Fleet, device_ms: float, **settings: str) -> tuple[Process, str]:
    """Start a worker; return it and the name of its model for recipes."""
    os.environ["BENCH_DEVICE_MS"] = str(device_ms)
    settings = {"slots": str(SLOTS), "node": f"stand-in-{device_ms:g}", "batch_limit": "8", **settings}
    worker = fleet.stack.start_worker(
        program=["-m", "tests.bench.device_worker"], device="cpu", model="stand-in", **settings
    )
    return worker, f"stand-in-{device_ms:g}ms@{'0' * 12}"


def _measure_size(
    fleet: Fleet, size: str, workers: dict[str, tuple[Process, str]], *, rounds: int, slots: int
) -> Iterator[Row]:
    photo = make_photo(*SIZES[size.replace("MP", " MP")])
    few = int(IMAGES[size] * MODEL_SHARE)
    fleet.upload(size.lower(), IMAGES[size], photo)
    fleet.upload(f"{size.lower()}-few", few, photo)
    path = fleet.stack.folder / f"{size}.jpg"
    path.write_bytes(photo)
    bare: list[tuple[float, float]] = []
    flows: dict[str, list[Flow]] = {}
    for turn in range(rounds):
        bare.append(run_bare(path, threads=slots, images=IMAGES[size]))
        for name, (worker, model) in workers.items():
            bucket = f"{size.lower()}-few" if name == MODEL else size.lower()
            in_flight = SLOTS_PER_BATCH_IMAGE * BATCH if name == slow_name(size) else slots
            flow = fleet.run(bucket, Recipe(model=model, edges="off"), [worker], slots=in_flight)
            flows.setdefault(name, []).append(flow)
        rates = ", ".join(f"{name} {measured[-1].rate:.1f}" for name, measured in flows.items())
        progress(f"{size}, round {turn + 1}: bare {bare[-1][0]:.1f}, {rates} images/s")
    yield from _rows(size, bare, flows, slots=slots)


def run_bare(photo: Path, *, threads: int, images: int) -> tuple[float, float]:
    """Return images per second and CPU milliseconds per image."""
    command = [sys.executable, "-m", "tests.bench.bare", str(photo)]
    numbers = ["--threads", str(threads), "--images", str(images)]
    ran = subprocess.run([*command, *numbers], check=True, capture_output=True, text=True)
    rate, cpu_ms = map(float, ran.stdout.split())
    return rate, cpu_ms


def _rows(size: str, bare: list[tuple[float, float]], flows: dict[str, list[Flow]], *, slots: int) -> Iterator[Row]:
    rates, costs = [rate for rate, _ in bare], [cpu_ms for _, cpu_ms in bare]
    path = "bare image path"
    yield row(f"{size}: {path}, {slots} threads", rates, "images/s", better="more")
    for name, measured in flows.items():
        reached = [flow.rate for flow in measured]
        yield _against(f"{size}: worker, {name}", reached, "images/s", path, rates if name in (FREE, BUSY) else [])
        for process in PROCESSES:
            times = [flow.cpu_ms[process] for flow in measured]
            yield row(f"{size}: {process}, {name}", times, "CPU ms/image")
        yield fact(f"{size}: worker, {name}, peak memory", max(flow.peak_mb for flow in measured), "MB")
    free = flows[FREE]
    own = [flow.cpu_ms["worker"] - statistics.median(costs) for flow in free]
    yield row(f"{size}: worker beside the image path (Celery, S3, ledger)", own, "CPU ms/image")
    bare_ms = statistics.median(costs)
    for what, names in (("the worker's", PROCESSES[:1]), ("all processes'", PROCESSES)):
        shares = [100 * bare_ms / sum(flow.cpu_ms[name] for name in names) for flow in free]
        yield row(f"{size}: the image path's share of {what} processor time", shares, "%", better="more")
    yield row(f"{size}: cores idle, {FREE}", [100 * flow.idle for flow in free], "%")
    share = [100 * flow.rate / (rate * (1 - _other_share(flow))) for flow, rate in zip(free, rates, strict=True)]
    yield row(f"{size}: worker, {FREE}, of the {path} on what the other processes leave", share, "%", better="more")
    for name, ms in ((BUSY, DEVICE_MS), (slow_name(size), SUFFICES_MS[size])):
        yield row(f"{size}: {name} busy", [flow.rate * ms / 10 for flow in flows[name]], "%", better="more")
    for what, names in (("worker", PROCESSES[:1]), ("whole fleet, store included", PROCESSES)):
        cpu_ms = statistics.median(sum(flow.cpu_ms[name] for name in names) for flow in free)
        yield fact(f"{size}: cores of the {what} that keep a {BUSY} busy", cpu_ms / DEVICE_MS, "cores")


def _other_share(flow: Flow) -> float:
    """Return the share of all cores' time that other processes than the worker used."""
    return flow.rate * sum(flow.cpu_ms[name] for name in PROCESSES[1:]) / 1000 / CORES


def _against(name: str, values: list[float], unit: str, against: str, others: list[float]) -> Row:
    return row(name, values, unit, against=against if others else "", others=others, better="more")


if __name__ == "__main__":
    main()
