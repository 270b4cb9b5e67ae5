"""What an image costs a worker beside its pixels: a flood of images so small that nothing else is left. All of it is
an upper bound of the time in which the interpreter runs: Celery, boto3, redis-py, our own code, and the system's calls.

    python -m tests.bench.interpreter [--rounds N] [--json FILE]

Requests are the worker's own counts, of images that no cutout was there of: one GET of the source, one PUT each of
mask and cutout; claim and finish, and the renewal of leases every few seconds.
"""

from __future__ import annotations

import argparse
import os
import re
import urllib.request
from collections.abc import Iterator

from jobs.recipe import Recipe
from producer.demo.local_stack import free_port
from tests.bench.flow import fleet
from tests.bench.image_path import make_photo
from tests.bench.report import Row, fact, progress, row, tell
from tests.bench.worker import SLOTS, run_bare, start_stand_in

SIDE = 64
IMAGES = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    tell(parser, measure)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    os.environ["BENCH_DEVICE_SIDE"] = str(SIDE)
    port, photo = free_port(), make_photo(SIDE, SIDE)
    with fleet() as here:
        worker, model = start_stand_in(here, 0, metrics_port=str(port))
        here.upload("tiny", IMAGES, photo)
        path = here.stack.folder / "tiny.jpg"
        path.write_bytes(photo)
        before, flows, bare = counts(port), [], []
        for turn in range(options.rounds):
            bare.append(run_bare(path, threads=SLOTS, images=IMAGES)[1])
            flows.append(here.run("tiny", Recipe(model=model, edges="off"), [worker], slots=SLOTS))
            progress(f"round {turn + 1}: worker {flows[-1].cpu_ms['worker']:.2f}, bare {bare[-1]:.2f} CPU ms an image")
        after = counts(port)
    yield row(f"worker, images of {SIDE} pixels", [flow.cpu_ms["worker"] for flow in flows], "CPU ms/image")
    yield row(f"of that, the bare image path of {SIDE} pixels", bare, "CPU ms/image")
    for service in after:
        each = (after[service] - before[service]) / (IMAGES * options.rounds)
        yield fact(f"requests to {service}", each, "an image")


def counts(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    found = dict(re.findall(r"^cutfleet_(s3|redis)_requests_total (\S+)$", text, re.MULTILINE))
    return {"S3": float(found["s3"]), "Redis by the ledger": float(found["redis"])}


if __name__ == "__main__":
    main()
