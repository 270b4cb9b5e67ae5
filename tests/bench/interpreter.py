"""Processor time of an image without its pixels: many tiny images. An upper bound of the time that the interpreter
runs: Celery, boto3, redis-py, our code and system calls.

    python -m tests.bench.interpreter [--rounds N] [--json FILE]

Requests are the worker's own counts for images without an existing cutout: one GET of the source, one PUT each of mask
and cutout; claim and finish, and a renewal of leases every few seconds.
"""

from __future__ import annotations

import argparse
import os
import re
import urllib.request
from collections.abc import Iterator

from jobs.recipe import Recipe
from producer.demo.local_stack import free_port
from tests.bench.flow import Flow, run_fleet
from tests.bench.image_path import make_photo
from tests.bench.report import Row, fact, progress, row, run_benchmark
from tests.bench.worker import SLOTS, run_bare, start_stand_in

SIDE = 64
IMAGES = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    run_benchmark(parser, measure)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    os.environ["BENCH_DEVICE_SIDE"] = str(SIDE)
    port, photo = free_port(), make_photo(SIDE, SIDE)
    with run_fleet() as fleet:
        worker, model = start_stand_in(fleet, 0, metrics_port=str(port))
        fleet.upload("tiny", IMAGES, photo)
        path = fleet.stack.folder / "tiny.jpg"
        path.write_bytes(photo)
        before = read_counts(port)
        flows: list[Flow] = []
        bare: list[float] = []
        for turn in range(options.rounds):
            bare.append(run_bare(path, threads=SLOTS, images=IMAGES)[1])
            flows.append(fleet.run("tiny", Recipe(model=model, edges="off"), [worker], slots=SLOTS))
            progress(f"round {turn + 1}: worker {flows[-1].cpu_ms['worker']:.2f}, bare {bare[-1]:.2f} CPU ms per image")
        after = read_counts(port)
    yield row(f"worker, images of {SIDE} pixels", [flow.cpu_ms["worker"] for flow in flows], "CPU ms/image")
    yield row(f"of that, the bare image path of {SIDE} pixels", bare, "CPU ms/image")
    for service in after:
        per_image = (after[service] - before[service]) / (IMAGES * options.rounds)
        yield fact(f"requests to {service}", per_image, "per image")


def read_counts(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    found = dict(re.findall(r"^cutfleet_(s3|redis)_requests_total (\S+)$", text, re.MULTILINE))
    return {"S3": float(found["s3"]), "Redis by the ledger": float(found["redis"])}


if __name__ == "__main__":
    main()
