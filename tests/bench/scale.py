"""Ten million images through ledger, dispatcher and messages: time and memory.

    python -m tests.bench.scale [--images N] [--consumers N | --celery N] [--json FILE]

Real Valkey, submission, manifest, dispatcher, messages, claims and commits, each in its own process. Simulated:
generated keys, a folder in place of S3, work that takes no time; consumers are loops, or real Celery workers with
`--celery`. One message in twenty is delivered twice. Ends with an error if a count is not exact.

These processes run with lower priority than Valkey and the process that reads the status, which have their own machines
in production.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import resource
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import redis

from jobs.broker import consume, make_app
from jobs.envelope import TASK_NAME, render_message
from jobs.job import ImageState, Job
from jobs.ledger import Ledger
from jobs.ledger.window import ClaimOutcome, Recorded
from jobs.liveness import LivenessFile
from jobs.message import ImageTask, queue_name
from jobs.recipe import Recipe
from jobs.s3.names import image_paths
from jobs.settings import Settings
from producer.demo.local_stack import LocalStack
from producer.dispatcher.dispatcher import Dispatcher
from producer.submission.request import Request
from producer.submission.submit import submit
from tests.bench.flow import run_valkey
from tests.bench.report import Row, fact, progress, run_benchmark
from tests.bench.simulated import DESTINATION, MODEL, SOURCE, Consumer, FolderStore, send_heartbeat

DUPLICATES = 0.05
SLOTS = 500
"""Of a consumer loop; the dispatcher's window depends on it."""
BATCH = 20
"""Messages that a consumer loop takes at once: more would block Redis longer than workers do."""
CELERY_SLOTS = 24
SAMPLE_S = 0.5
IDLE_READS = 1000
NICE = 10
SLOW_US, SLOW_ENTRIES = 5_000, 128
"""Threshold and length of Redis's slow log: an entry takes 4 kB of the memory that is measured."""


@dataclasses.dataclass
class Samples:
    """Measured while the job runs. `step_ms`: longest command of Redis."""

    status_ms: list[float] = dataclasses.field(default_factory=list)
    idle_ms: list[float] = dataclasses.field(default_factory=list)
    memory_mb: float = 0.0
    resident_mb: float = 0.0
    step_ms: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000_000)
    parser.add_argument("--consumers", type=int, default=2)
    parser.add_argument("--celery", type=int, default=0, metavar="WORKERS")
    run_benchmark(parser, measure)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    with run_valkey() as stack, stack.ledger() as ledger:
        yield from _measure(stack, ledger, stack.folder / "store", options)


def _measure(stack: LocalStack, ledger: Ledger, folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    count, url = options.images, stack.environment["CUTFLEET_REDIS_URL"]
    context = multiprocessing.get_context("spawn")
    results: SimpleQueue[Any] = context.SimpleQueue()
    stop = context.Event()
    consumer = _celery if options.celery else _consume
    workers = [
        context.Process(target=_with_low_priority, args=(consumer, url, number, stop, results))
        for number in range(options.celery or options.consumers)
    ]
    dispatcher = context.Process(target=_with_low_priority, args=(run_dispatcher, url, str(folder), stop))
    submitter = context.Process(target=_with_low_priority, args=(_submit, url, str(folder), count, results))
    started = time.monotonic()
    for process in (dispatcher, *workers, submitter):
        process.start()
    samples = Samples()
    try:
        while not (found := ledger.jobs.newest()):
            assert submitter.exitcode in (None, 0), "the submission failed"
            time.sleep(0.05)
        job, listed_s = _watch(ledger, found[0].id, url, started, samples, [dispatcher, *workers])
        seconds = time.monotonic() - started
        submission = results.get()
    finally:
        stop.set()
    figures = [results.get() for _ in workers]
    for process in (*workers, dispatcher, submitter):
        process.join()
    _check(ledger, job, count, figures)
    samples.idle_ms = [_status(ledger, job.id)[1] for _ in range(IDLE_READS)]
    yield from _rows(count, seconds, listed_s, submission, samples, figures)


def _watch(
    ledger: Ledger, job_id: str, url: str, started: float, samples: Samples, processes: list[Any]
) -> tuple[Job, float]:
    """Sample the duration of a status request and the memory of Redis until the job is closed. Return the job, and how
    long the listing took."""
    listed_s, next_line = 0.0, started
    with redis.Redis.from_url(url) as client:
        client.config_set("slowlog-log-slower-than", SLOW_US)
        client.config_set("slowlog-max-len", SLOW_ENTRIES)
        while True:
            job, ms = _status(ledger, job_id)
            samples.status_ms.append(ms)
            memory: Any = client.info("memory")
            samples.memory_mb = memory["used_memory_peak"] / 1e6
            samples.resident_mb = max(samples.resident_mb, memory["used_memory_rss"] / 1e6)
            if job.listed and not listed_s:
                listed_s = time.monotonic() - started
            if job.closed is not None:
                slow: Any = client.slowlog_get(SLOW_ENTRIES)
                samples.step_ms = max((entry["duration"] / 1000 for entry in slow), default=SLOW_US / 1000)
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
    """Read what `cutfleet status JOB` reads; return the job and the milliseconds taken."""
    before = time.perf_counter()
    job, _, _ = ledger.jobs.look(job_id)
    return job, 1000 * (time.perf_counter() - before)


def _check(ledger: Ledger, job: Job, count: int, figures: list[Mapping[str, int]]) -> None:
    """Assert that every image is done by its bits, and was counted once."""
    assert (job.total, job.done, job.final) == (count, count, count), job
    for first in range(0, count, 1_000_000):
        states = ledger.images.states(job.id, first, min(1_000_000, count - first))
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
    yield fact("status of the closed job, nothing else running, median", statistics.median(samples.idle_ms), "ms")
    yield fact(f"the same, slowest of {IDLE_READS:,}", max(samples.idle_ms), "ms")


def _with_low_priority(role: Callable[..., None], *args: Any) -> None:
    os.nice(NICE)
    role(*args)


def _submit(url: str, folder: str, count: int, results: SimpleQueue[Any]) -> None:
    early: list[float] = []

    def listed(found: int) -> None:
        if found >= 100_000 and not early:
            early.append(_resident_mb())

    request = Request(
        source=SOURCE, destination=DESTINATION, recipe=Recipe(model=MODEL), lane="backfill", name="scale", keys=None
    )
    with Ledger(url, name="scale") as ledger:
        while not ledger.fleet.workers():
            time.sleep(0.05)
        submit(request, store=FolderStore(Path(folder), count), ledger=ledger, lease_s=60, listed=listed)
    results.put({"max_mb": _resident_mb(), "early_mb": early[0] if early else _resident_mb()})


def run_dispatcher(url: str, folder: str, stop: Any) -> None:
    with Ledger(url, name="scale") as ledger:
        dispatcher_stop = threading.Event()
        _when_set(stop, dispatcher_stop.set)
        Dispatcher(ledger, FolderStore(Path(folder), 0), Settings(redis_url=url)).run(dispatcher_stop)


def _consume(url: str, number: int, stop: Any, results: SimpleQueue[Any]) -> None:
    with Ledger(url, name="scale") as ledger:
        consumer = Consumer(url, duplicates=DUPLICATES, seed=number)
        next_beat = 0.0
        while not stop.is_set():
            if time.monotonic() >= next_beat:
                send_heartbeat(ledger, node=f"bare{number}", slots=SLOTS)
                next_beat = time.monotonic() + 5
            claims = consumer.take(BATCH)
            consumer.finish(claims)
            if not claims:
                time.sleep(0.02)
        consumer.close()
    results.put({**consumer.outcomes, "injected": consumer.injected})


def _celery(url: str, number: int, stop: Any, results: SimpleQueue[Any]) -> None:
    """Run a real Celery worker whose task claims and commits, and delivers one message in twenty a second time."""
    from workers.process.kombu_patches import install_patches

    app = make_app(url)
    consume(app, MODEL)
    install_patches(app, LivenessFile(""))
    figures = {"finish ok": 0, "injected": 0}
    lock = threading.Lock()
    ledger = Ledger(url, name="scale")
    client = redis.Redis.from_url(url)

    @app.task(name=TASK_NAME, ignore_result=True)  # type: ignore[untyped-decorator]  # Celery has no types
    def image(task: Mapping[str, Any]) -> str:
        found = ImageTask.from_fields(task)
        output = str(image_paths(SOURCE, DESTINATION, found.key).cutout)
        claim = ledger.window.claim(found.id, token=uuid.uuid4().hex, output=output, lease_s=60)
        if claim.outcome is not ClaimOutcome.GO:
            return str(claim.outcome)
        if found.index % round(1 / DUPLICATES) == 0:
            _deliver_twice(client, found)
            with lock:
                figures["injected"] += 1
        if ledger.window.finish(claim, ImageState.DONE) is Recorded.OK:
            with lock:
                figures["finish ok"] += 1
        return "done"

    send_heartbeat(ledger, node=f"celery{number}", slots=CELERY_SLOTS)
    worker = app.Worker(
        hostname=f"celery{number}@scale",
        pool="threads",
        concurrency=CELERY_SLOTS,
        quiet=True,
        without_gossip=True,
        without_mingle=True,
        task_events=True,
    )
    _when_set(stop, worker.stop)
    worker.start()
    results.put(figures)


def _deliver_twice(client: redis.Redis, task: ImageTask) -> None:
    queue = queue_name(task.lane, MODEL)
    message = render_message(task, source=SOURCE.at(task.key)).replace("%TAG%", f"{task.id}:second", 1)
    client.lpush(queue, message.replace("%QUEUE%", queue, 1))


def _when_set(stop: Any, call: Callable[[], object]) -> None:
    """Call `call` in a thread once the event of multiprocessing is set."""

    def wait() -> None:
        stop.wait()
        call()

    threading.Thread(target=wait, daemon=True).start()


def _resident_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


if __name__ == "__main__":
    main()
