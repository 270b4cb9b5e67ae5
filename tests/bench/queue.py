"""Rate of the queue: feeding, and claiming and committing, against plain `task.delay`.

    python -m tests.bench.queue [--images N] [--json FILE]

Real Valkey, ledger and messages; a loop in place of Celery's worker, and work that takes no time.
"""

from __future__ import annotations

import argparse
import functools
import time
import uuid
from collections.abc import Callable, Iterator

import redis

from jobs.broker import make_app
from jobs.envelope import TASK_NAME, message_row, parse_message
from jobs.job import ImageState, Job, ManifestPart
from jobs.ledger import Ledger
from jobs.ledger.dispatch import FEED_ROWS
from jobs.ledger.window import ClaimOutcome
from jobs.message import ImageTask, queue_name, worker_queues
from jobs.s3.location import Location
from producer.demo.local_stack import LocalStack
from tests.bench.flow import run_valkey
from tests.bench.report import Row, row, run_benchmark

ROUNDS = 3
MODEL = "bench"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000, help="images in each round")
    run_benchmark(parser, measure)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    with run_valkey() as stack:
        rates = _measure(stack, options.images)
    celery = rates.pop("delay")
    for name, values in rates.items():
        yield row(name, values, "images/s", against="Celery's `delay`", others=celery, better="more")


def _measure(stack: LocalStack, count: int) -> dict[str, list[float]]:
    """Return the rates of each step. Steps alternate, so that a slow minute of the machine affects all of them."""
    url = stack.environment["CUTFLEET_REDIS_URL"]
    rates: dict[str, list[float]] = {}

    def time_step(name: str, step: Callable[[], None]) -> None:
        started = time.perf_counter()
        step()
        rates.setdefault(name, []).append(count / (time.perf_counter() - started))

    with Ledger(url, name="bench") as ledger:
        client = redis.Redis.from_url(url)
        for turn in range(ROUNDS):
            job = _job(turn)
            time_step("delay", lambda: _delay(url, count))
            client.delete(*worker_queues(MODEL))
            time_step("feed (ledger and queue)", functools.partial(_feed, ledger, job, count))
            time_step("claim and commit", lambda: _consume(ledger, client, count))
            assert ledger.jobs.get(job.id).done == count
        client.close()
    return rates


def _job(turn: int) -> Job:
    return Job(
        id=f"bench-{turn}",
        name="bench",
        source=Location("in", ""),
        destination=Location("out", ""),
        recipe_json="{}",
        model=MODEL,
        lane="backfill",
        conditional=True,
        created=0,
    )


def _delay(url: str, count: int) -> None:
    app = make_app(url)
    from kombu.entity import Queue

    queue = Queue(queue_name("backfill", MODEL))  # type: ignore[no-untyped-call]  # kombu has few types
    app.conf.task_queues = [queue]

    @app.task(name=TASK_NAME, ignore_result=True)  # type: ignore[untyped-decorator]  # Celery has no types
    def image(task: dict[str, object]) -> None:
        """Published only."""

    for index in range(count):
        task = ImageTask("bench", index, f"photos/{index:08d}.jpg", "0" * 32, 500_000, "backfill")
        image.apply_async(kwargs={"task": task.to_fields()}, queue=queue.name)
    app.close()


def _feed(ledger: Ledger, job: Job, count: int) -> None:
    epoch = ledger.dispatch.lead("bench", ttl_s=600)
    assert epoch is not None
    ledger.jobs.create(job)
    ledger.jobs.add_part(job.id, ledger.jobs.take_listing(job.id), ManifestPart(0, "a", "z", count))
    ledger.jobs.finish_listing(job.id)
    for cursor in range(0, count, FEED_ROWS):
        tasks = [
            ImageTask(job.id, index, f"photos/{index:08d}.jpg", "0" * 32, 500_000, job.lane)
            for index in range(cursor, min(count, cursor + FEED_ROWS))
        ]
        rows = [message_row(task, job) for task in tasks]
        assert ledger.dispatch.feed(epoch, job.id, cursor, rows, lease_s=600)


def _consume(ledger: Ledger, client: redis.Redis, count: int) -> None:
    queue = queue_name("backfill", MODEL)
    for _ in range(count):
        message = client.rpop(queue)
        assert isinstance(message, bytes)
        task = parse_message(message.decode())
        output = f"s3://out/cutouts/{task.key}.png"
        claim = ledger.window.claim(task.id, token=uuid.uuid4().hex, output=output, lease_s=60)
        assert claim.outcome is ClaimOutcome.GO
        ledger.window.finish(claim, ImageState.DONE)


if __name__ == "__main__":
    main()
