"""Plain Celery tasks with Pillow: one task an image on Celery's own worker with its default pool, a process for each
core, each with its model. Started by itself for producer and worker alike.
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

from tests.bench.compare.places import client, fetch, places, publish, timed
from tests.bench.compare.recipe import Model, cut_out, load_model

URL = os.environ["CUTFLEET_REDIS_URL"].replace("/0", "/9")
app = Celery("plain", broker=URL)
app.conf.task_ignore_result = True


@functools.cache
def model() -> Model:
    return load_model(threads=1)


@functools.cache
def store() -> Any:
    return client()


@worker_process_init.connect
def get_ready(**_: object) -> None:
    """Without this the first image of each process would wait for the model."""
    model()
    redis.Redis.from_url(URL).incr("ready")


@app.task(name="plain.cut_out")  # type: ignore[untyped-decorator]  # Celery has no types
def image(source: str, target: str, key: str) -> None:
    s3 = store()
    publish(s3, target, key, *cut_out(fetch(s3, source, key), model()))
    redis.Redis.from_url(URL).incr("done")


def main() -> None:
    where, cores = places(), len(os.sched_getaffinity(0))
    broker = redis.Redis.from_url(URL)
    broker.flushdb()
    command = ["-m", "celery", "-A", "tests.bench.compare.plain_celery", "worker", "-c", str(cores), "-l", "error"]
    worker = subprocess.Popen([sys.executable, *command], stdout=sys.stderr)
    try:
        wait_for(broker, "ready", cores)
        with timed():
            for key in where.keys:
                image.delay(where.source, where.target, key)
            wait_for(broker, "done", where.count)
    finally:
        worker.terminate()
        worker.wait()


def wait_for(broker: redis.Redis, key: str, count: int) -> None:
    while int(broker.get(key) or 0) < count:  # type: ignore[arg-type]  # its synchronous form
        time.sleep(0.05)


if __name__ == "__main__":
    main()
