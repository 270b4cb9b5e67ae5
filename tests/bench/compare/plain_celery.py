"""Plain Celery tasks with Pillow: one task per image, on Celery's worker with its default pool: a process with its own
model for each core. This module is the producer and, started by it, the worker.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from typing import Any

import redis
from celery import Celery
from celery.signals import worker_process_init

from tests.bench.compare.arguments import client, fetch, parse_arguments, publish, timed
from tests.bench.compare.recipe import Model, cut_out, load_model

URL = os.environ.get("CUTFLEET_REDIS_URL", "redis://127.0.0.1:6379/0").replace("/0", "/9")
app = Celery("plain", broker=URL)
app.conf.task_ignore_result = True


@functools.cache
def model() -> Model:
    return load_model(threads=1)


@functools.cache
def store() -> Any:
    return client()


@worker_process_init.connect  # type: ignore[untyped-decorator]  # Celery has no types
def load_early(**_: object) -> None:
    """Load the model before the first image of each process."""
    model()
    redis.Redis.from_url(URL).incr("ready")


@app.task(name="plain.cut_out")  # type: ignore[untyped-decorator]  # Celery has no types
def image(source: str, target: str, key: str) -> None:
    s3 = store()
    publish(s3, target, key, *cut_out(fetch(s3, source, key), model()))
    redis.Redis.from_url(URL).incr("done")


def main() -> None:
    task, cores = parse_arguments(), len(os.sched_getaffinity(0))
    broker = redis.Redis.from_url(URL)
    broker.flushdb()
    command = ["-m", "celery", "-A", "tests.bench.compare.plain_celery", "worker", "-c", str(cores), "-l", "error"]
    worker = subprocess.Popen([sys.executable, *command], stdout=sys.stderr)
    try:
        wait_for(broker, "ready", cores)
        with timed():
            for key in task.keys:
                image.delay(task.source, task.target, key)
            wait_for(broker, "done", task.count)
    finally:
        worker.terminate()
        worker.wait()


def wait_for(broker: redis.Redis, key: str, count: int) -> None:
    while int(broker.get(key) or 0) < count:
        time.sleep(0.05)


if __name__ == "__main__":
    main()
