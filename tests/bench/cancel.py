"""How long it takes to cancel a large job, and how long other requests wait meanwhile.

    nice python -m tests.bench.cancel [--images N] [--json FILE]

Real Valkey, ledger and dispatcher, which is its own process; a folder in place of S3, and heartbeats without workers.
In every third part of the manifest, each tenth image is skipped already.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis

from jobs.job import Job, ManifestPart
from jobs.ledger import Ledger
from jobs.recipe import Recipe
from jobs.s3.client import S3Object, Store
from producer.demo.local_stack import LocalStack
from producer.records.manifest import PART_ROWS, write_part
from producer.submission.request import Request
from producer.submission.submit import draft_job
from tests.bench.flow import run_valkey
from tests.bench.report import Row, fact, run_benchmark
from tests.bench.scale import run_dispatcher
from tests.bench.simulated import DESTINATION, MODEL, SOURCE, FolderStore, send_heartbeat

SLOTS = 500
SLOW_US = 200
"""Threshold of Valkey's slow log."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000_000)
    run_benchmark(parser, measure)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    with run_valkey() as stack, stack.ledger() as ledger:
        yield from _measure(stack, ledger, stack.folder / "store", options.images)


def _measure(stack: LocalStack, ledger: Ledger, folder: Path, count: int) -> Iterator[Row]:
    url = stack.environment["CUTFLEET_REDIS_URL"]
    job = _list(ledger, FolderStore(folder, 0), count)
    send_heartbeat(ledger, node="no-worker", slots=SLOTS)
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    dispatcher = context.Process(target=run_dispatcher, args=(url, str(folder), stop))
    dispatcher.start()
    try:
        while not ledger.jobs.get(job.id).window:
            time.sleep(0.1)
        yield from _cancel(ledger, job.id, url)
    finally:
        stop.set()
        dispatcher.join()


def _list(ledger: Ledger, store: Store, count: int) -> Job:
    recipe = Recipe(model=MODEL)
    request = Request(source=SOURCE, destination=DESTINATION, recipe=recipe, lane="backfill", name="cancel", keys=None)
    job = draft_job(request, job_id="20260101-000000-000000", store=store)
    ledger.jobs.create(job)
    lister = ledger.jobs.take_listing(job.id)
    for first in range(0, count, PART_ROWS):
        rows = [S3Object(f"photos/{index:08d}.jpg", "e", 1) for index in range(first, min(count, first + PART_ROWS))]
        part = ManifestPart(first // PART_ROWS, rows[0].key, rows[-1].key, len(rows))
        write_part(store, job, part, rows, is_next=lambda: True)
        skipped = [part.number % 3 == 2 and index % 10 == 0 for index in range(len(rows))]
        ledger.jobs.add_part(job.id, lister, part, first=first, skipped=skipped)
    ledger.jobs.finish_listing(job.id)
    return job


def _cancel(ledger: Ledger, job_id: str, url: str) -> Iterator[Row]:
    with redis.Redis.from_url(url) as client:
        client.config_set("slowlog-log-slower-than", SLOW_US)
        client.config_set("slowlog-max-len", 10_000)
        client.slowlog_reset()
        fed = ledger.jobs.get(job_id).window
        started = time.perf_counter()
        ledger.jobs.cancel(job_id)
        reads_ms: list[float] = []
        while (job := ledger.jobs.get(job_id)).open:
            before = time.perf_counter()
            ledger.jobs.look(job_id)
            reads_ms.append(1000 * (time.perf_counter() - before))
            time.sleep(0.002)
        seconds = time.perf_counter() - started
        slow: Any = client.slowlog_get(10_000)
        memory: Any = client.info("memory")
        while ledger.jobs.get(job_id).closed is None:
            time.sleep(0.1)
        closed_s = time.perf_counter() - started
    assert job.final == job.total == job.cancelled_images + job.skipped, job
    assert not ledger.jobs.check(job_id, repair=False).counts
    yield fact("images cancelled, every count exact", job.cancelled_images, "")
    yield fact("of them on a queue", fed, "")
    yield fact("until all are final", seconds, "s")
    yield fact("longest step of Redis", max((found["duration"] for found in slow), default=SLOW_US) / 1000, "ms")
    yield fact(f"status meanwhile, slowest of {len(reads_ms)}", max(reads_ms, default=0), "ms")
    yield fact("Redis, greatest memory", memory["used_memory_peak"] / 1e6, "MB")
    yield fact("until the report is written and the job closed", closed_s, "s")


if __name__ == "__main__":
    main()
