"""What the queue costs an image: feeding, claiming and committing against plain `task.delay` and Celery's own result.

    python -m tests.bench.queue [--images N] [--json FILE]

Real Valkey, real ledger and messages; a bare consumer stands in for Celery's worker, and work takes no time.
"""

from __future__ import annotations

import argparse
import time
import uuid
from collections.abc import Callable, Iterator

import redis

from jobs.broker import TASK_NAME, lane_queue, make_app, render, task_of, worker_queues
from jobs.job import ImageState, Job, ManifestPart
from jobs.ledger import FEED_ROWS, Ledger
from jobs.message import ImageTask
from producer.demo.local_stack import LocalStack
from tests.bench.flow import valkey_alone
from tests.bench.report import Row, row, tell

ROUNDS = 3
MODEL = "bench"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000, help="in each round")
    tell(parser, measure)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    with valkey_alone() as stack:
        rates = _measure(stack, options.images)
    plain = rates.pop("delay")
    for name, values in rates.items():
        yield row(name, values, "images/s", against="Celery's `delay`", others=plain, better="more")


def _measure(stack: LocalStack, count: int) -> dict[str, list[float]]:
    """Alternating, so that a slow minute of the machine hits every step."""
    url = stack.environment["CUTFLEET_REDIS_URL"]
    rates: dict[str, list[float]] = {}

    def timed(name: str, step: Callable[[], None]) -> None:
        started = time.perf_counter()
        step()
        rates.setdefault(name, []).append(count / (time.perf_counter() - started))

    with Ledger(url, name="bench") as ledger:
        client = redis.Redis.from_url(url)
        for turn in range(ROUNDS):
            job = _job(turn)
            timed("delay", lambda: _delay(url, count))
            client.delete(*worker_queues(MODEL))
            timed("feed (ledger and queue)", lambda job=job: _feed(ledger, job, count))
            timed("claim and commit", lambda: _consume(ledger, client, count))
            assert ledger.job(job.id).done == count
        client.close()
    return rates


def _job(turn: int) -> Job:
    return Job(
        id=f"bench-{turn}",
        name="bench",
        source="s3://in/",
        destination="s3://out/",
        recipe="{}",
        model=MODEL,
        lane="backfill",
        conditional=True,
        created=0,
    )


def _delay(url: str, count: int) -> None:
    app = make_app(url)
    from kombu.entity import Queue

    queue = Queue(lane_queue("backfill", MODEL))
    app.conf.task_queues = [queue]

    @app.task(name=TASK_NAME, ignore_result=True)
    def image(task: dict[str, object]) -> None:
        """Only published here."""

    for index in range(count):
        task = ImageTask("bench", index, f"photos/{index:08d}.jpg", "0" * 32, 500_000, "backfill")
        image.apply_async(kwargs={"task": task.to_fields()}, queue=queue.name)
    app.close()


def _feed(ledger: Ledger, job: Job, count: int) -> None:
    epoch = ledger.lead("bench", ttl_s=600)
    assert epoch is not None
    ledger.create_job(job)
    ledger.add_part(job.id, ledger.take_listing(job.id), ManifestPart(0, "a", "z", count))
    ledger.finish_listing(job.id)
    queue = lane_queue(job.lane, job.model)
    for cursor in range(0, count, FEED_ROWS):
        tasks = [
            ImageTask(job.id, index, f"photos/{index:08d}.jpg", "0" * 32, 500_000, job.lane)
            for index in range(cursor, min(count, cursor + FEED_ROWS))
        ]
        rows = [(queue, render(task, source_uri=f"s3://in/{task.key}")) for task in tasks]
        assert ledger.feed(epoch, job.id, cursor, rows, lease_s=600)


def _consume(ledger: Ledger, client: redis.Redis, count: int) -> None:
    queue = lane_queue("backfill", MODEL)
    for _ in range(count):
        message = client.rpop(queue)
        assert isinstance(message, bytes)
        task = task_of(message.decode())
        output = f"s3://out/cutouts/{task.key}.png"
        claim = ledger.claim(task.id, token=uuid.uuid4().hex, output=output, lease_s=60)
        assert claim.verdict == "go"
        ledger.finish(claim, ImageState.DONE)


if __name__ == "__main__":
    main()
