"""Ten million images through ledger, dispatcher and messages, and what that costs.

    python -m tests.bench.scale [--images N] [--consumers N | --celery N] [--json FILE]

Real Valkey, real submission and manifest, real dispatcher, real messages, claims and commits, each in a process of its
own. Stand-ins: generated keys, a folder in the place of S3, work of no length; the consumers are bare, or real Celery
workers with `--celery`. One message in twenty is delivered twice. Ends with an error if a single count is not exact.

These processes are nicer than Valkey and than the one who asks for the status: those have machines of their own.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import resource
import statistics
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import redis

from jobs.broker import TASK_NAME, consume, make_app
from jobs.job import ImageState, Job
from jobs.ledger import Ledger
from jobs.liveness import AliveFile
from jobs.message import ImageTask
from jobs.recipe import Recipe
from jobs.s3.client import image_names
from jobs.settings import Settings
from producer.demo.local_stack import LocalStack
from producer.dispatcher.dispatcher import Dispatcher
from producer.submission.submit import Request, submit
from tests.bench.flow import valkey_alone
from tests.bench.report import Row, fact, progress, tell
from tests.bench.simulated import DESTINATION, MODEL, SOURCE, Consumer, FolderStore, say_alive

DUPLICATES = 0.05
SLOTS = 500
"""Of a bare consumer: the dispatcher's window follows."""
HANDFUL = 20
"""Messages a bare consumer takes at once: more would keep Redis from everybody else for longer, as no worker does."""
CELERY_SLOTS = 24
SAMPLE_S = 0.5
QUIET_LOOKS = 1000
NICE = 10
NOTED_US, NOTED = 5_000, 128
"""Of Redis's steps, those that take longer, and the last so many: each takes some 4 kB of what is measured here."""


@dataclasses.dataclass
class Samples:
    """What is looked at while it runs."""

    status_ms: list[float] = dataclasses.field(default_factory=list)
    quiet_ms: list[float] = dataclasses.field(default_factory=list)
    memory_mb: float = 0.0
    resident_mb: float = 0.0
    step_ms: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000_000)
    parser.add_argument("--consumers", type=int, default=2)
    parser.add_argument("--celery", type=int, default=0, metavar="WORKERS")
    tell(parser, measure)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    with valkey_alone() as stack, stack.ledger() as ledger:
        yield from _measure(stack, ledger, stack.folder / "store", options)


def _measure(stack: LocalStack, ledger: Ledger, folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    count, url = options.images, stack.environment["CUTFLEET_REDIS_URL"]
    context = multiprocessing.get_context("spawn")
    told: SimpleQueue[Any] = context.SimpleQueue()
    stop = context.Event()
    consumer = _celery if options.celery else _consume
    workers = [
        context.Process(target=_nicely, args=(consumer, url, number, stop, told))
        for number in range(options.celery or options.consumers)
    ]
    dispatcher = context.Process(target=_nicely, args=(run_dispatcher, url, str(folder), stop))
    submitter = context.Process(target=_nicely, args=(_submit, url, str(folder), count, told))
    started = time.monotonic()
    for process in (dispatcher, *workers, submitter):
        process.start()
    samples = Samples()
    try:
        while not (found := ledger.jobs()):
            assert submitter.exitcode in (None, 0), "the submission failed"
            time.sleep(0.05)
        job, listed_s = _watch(ledger, found[0].id, url, started, samples, [dispatcher, *workers])
        seconds = time.monotonic() - started
        submission = told.get()
    finally:
        stop.set()
    figures = [told.get() for _ in workers]
    for process in (*workers, dispatcher, submitter):
        process.join()
    _check(ledger, job, count, figures)
    samples.quiet_ms = [_status(ledger, job.id)[1] for _ in range(QUIET_LOOKS)]
    yield from _rows(count, seconds, listed_s, submission, samples, figures)


def _watch(
    ledger: Ledger, job_id: str, url: str, started: float, samples: Samples, processes: list[Any]
) -> tuple[Job, float]:
    """Until the job is closed: how long a status takes, and what Redis holds."""
    listed_s, next_line = 0.0, started
    with redis.Redis.from_url(url) as client:
        client.config_set("slowlog-log-slower-than", NOTED_US)
        client.config_set("slowlog-max-len", NOTED)
        while True:
            job, ms = _status(ledger, job_id)
            samples.status_ms.append(ms)
            memory: Any = client.info("memory")
            samples.memory_mb = memory["used_memory_peak"] / 1e6
            samples.resident_mb = max(samples.resident_mb, memory["used_memory_rss"] / 1e6)
            if job.listed and not listed_s:
                listed_s = time.monotonic() - started
            if job.closed is not None:
                slow: Any = client.slowlog_get(NOTED)
                samples.step_ms = max((entry["duration"] / 1000 for entry in slow), default=NOTED_US / 1000)
                return job, listed_s
            if any(process.exitcode not in (None, 0) for process in processes):
                raise RuntimeError("a process of the simulation has died")
            if time.monotonic() >= next_line:
                progress(
                    f"{time.monotonic() - started:6.0f} s: {job.total:,} listed, {job.cursor:,} fed, {job.done:,} done"
                )
                next_line += 30
            time.sleep(SAMPLE_S)


def _status(ledger: Ledger, job_id: str) -> tuple[Job, float]:
    """What `cutfleet status JOB` asks for, and how many milliseconds the answer took."""
    before = time.perf_counter()
    job, _, _ = ledger.look(job_id)
    return job, 1000 * (time.perf_counter() - before)


def _check(ledger: Ledger, job: Job, count: int, figures: list[Mapping[str, int]]) -> None:
    """From outside: every image is done by its bits, and was counted once."""
    assert (job.total, job.done, job.final) == (count, count, count), job
    for first in range(0, count, 1_000_000):
        states = ledger.states(job.id, first, min(1_000_000, count - first))
        assert set(states) == {ImageState.DONE}
    assert sum(found["finish ok"] for found in figures) == count, figures


def _rows(
    count: int,
    seconds: float,
    listed_s: float,
    submission: Mapping[str, float],
    samples: Samples,
    figures: list[Mapping[str, int]],
) -> Iterator[Row]:
    twice = sum(found["injected"] for found in figures)
    yield fact("images, every count exact", count, "")
    yield fact("delivered twice", twice, f"messages ({100 * twice / count:.1f} %)")
    yield fact("whole job", seconds / 60, "minutes")
    yield fact("listed (while the rest ran)", count / listed_s, "images/s")
    yield fact("fed and committed", count / seconds, "images/s")
    yield fact("submitting process, greatest resident size", submission["max_mb"], "MB")
    yield fact("the same after its first 100,000 images", submission["early_mb"], "MB")
    yield fact("Redis, greatest memory", samples.memory_mb, "MB")
    yield fact("Redis, greatest resident size", samples.resident_mb, "MB")
    yield fact("Redis, an image", samples.memory_mb * 1e6 / count, "bytes")
    yield fact("Redis, longest step", samples.step_ms, "ms")
    yield fact("status, median", statistics.median(samples.status_ms), "ms")
    yield fact("status, 99th percentile", statistics.quantiles(samples.status_ms, n=100, method="inclusive")[98], "ms")
    yield fact(f"status, slowest of {len(samples.status_ms):,}", max(samples.status_ms), "ms")
    yield fact("status of the closed job, nothing else running, median", statistics.median(samples.quiet_ms), "ms")
    yield fact(f"the same, slowest of {QUIET_LOOKS:,}", max(samples.quiet_ms), "ms")


def _nicely(role: Callable[..., None], *args: Any) -> None:
    os.nice(NICE)
    role(*args)


def _submit(url: str, folder: str, count: int, told: SimpleQueue[Any]) -> None:
    early: list[float] = []

    def listed(found: int) -> None:
        if found >= 100_000 and not early:
            early.append(_resident_mb())

    request = Request(
        source=SOURCE, destination=DESTINATION, recipe=Recipe(model=MODEL), lane="backfill", name="scale", keys=None
    )
    with Ledger(url, name="scale") as ledger:
        while not ledger.workers():
            time.sleep(0.05)
        submit(request, store=FolderStore(Path(folder), count), ledger=ledger, lease_s=60, listed=listed)
    told.put({"max_mb": _resident_mb(), "early_mb": early[0] if early else _resident_mb()})


def run_dispatcher(url: str, folder: str, stop: Any) -> None:
    with Ledger(url, name="scale") as ledger:
        _stop_with(dispatcher_stop := threading.Event(), stop)
        Dispatcher(ledger, FolderStore(Path(folder), 0), Settings(redis_url=url)).run(dispatcher_stop)


def _consume(url: str, number: int, stop: Any, told: SimpleQueue[Any]) -> None:
    with Ledger(url, name="scale") as ledger:
        consumer = Consumer(url, duplicates=DUPLICATES, seed=number)
        next_beat = 0.0
        while not stop.is_set():
            if time.monotonic() >= next_beat:
                say_alive(ledger, node=f"bare{number}", slots=SLOTS)
                next_beat = time.monotonic() + 5
            claims = consumer.take(HANDFUL)
            consumer.finish(claims)
            if not claims:
                time.sleep(0.02)
        consumer.close()
    told.put({**consumer.verdicts, "injected": consumer.injected})


def _celery(url: str, number: int, stop: Any, told: SimpleQueue[Any]) -> None:
    """A real Celery worker; the task claims and commits, and delivers one message in twenty a second time."""
    from workers.process.kombu_patches import harden

    app = make_app(url)
    consume(app, MODEL)
    harden(app, AliveFile(""))
    figures = {"finish ok": 0, "injected": 0}
    lock = threading.Lock()
    ledger = Ledger(url, name="scale")
    client = redis.Redis.from_url(url)

    @app.task(name=TASK_NAME, ignore_result=True)  # type: ignore[untyped-decorator]  # Celery has no types
    def image(task: Mapping[str, Any]) -> str:
        found = ImageTask.from_fields(task)
        output = str(image_names(SOURCE, DESTINATION, found.key).cutout)
        claim = ledger.claim(found.id, token=uuid.uuid4().hex, output=output, lease_s=60)
        if claim.verdict != "go":
            return claim.verdict
        if found.index % round(1 / DUPLICATES) == 0:
            _deliver_again(client, found)
            with lock:
                figures["injected"] += 1
        if ledger.finish(claim, ImageState.DONE) == "ok":
            with lock:
                figures["finish ok"] += 1
        return "done"

    say_alive(ledger, node=f"celery{number}", slots=CELERY_SLOTS)
    worker = app.Worker(
        hostname=f"celery{number}@scale",
        pool="threads",
        concurrency=CELERY_SLOTS,
        quiet=True,
        without_gossip=True,
        without_mingle=True,
        task_events=True,
    )
    threading.Thread(target=lambda: (stop.wait(), worker.stop()), daemon=True).start()
    worker.start()
    told.put(figures)


def _deliver_again(client: redis.Redis, task: ImageTask) -> None:
    from jobs.broker import lane_queue, render

    queue = lane_queue(task.lane, MODEL)
    message = render(task, source_uri="s3://in/again").replace("%TAG%", f"{task.id}:again", 1)
    client.lpush(queue, message.replace("%QUEUE%", queue, 1))


def _stop_with(event: threading.Event, stop: Any) -> None:
    threading.Thread(target=lambda: (stop.wait(), event.set()), daemon=True).start()


def _resident_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


if __name__ == "__main__":
    sys.exit(main())
