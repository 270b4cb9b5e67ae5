"""The control: a plain Celery task with late acknowledgement and no ledger, as any guide to Celery on Redis has it.

    python tests/faults/plain.py REDIS_URL [POLL_S]

runs its worker with stock kombu. `done:N` in Redis says that message N was worked on. POLL_S: how long it waits in one
BRPOP, in place of a second, so that a worker frozen in it is still handed what is pushed after that.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import redis
from celery import Celery


def make_plain(url: str, poll_s: float | None = None) -> tuple[Celery, Any]:
    app = Celery("plain", broker=url, set_as_current=False)
    app.conf.update(
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,
        task_ignore_result=True,
        broker_connection_retry_on_startup=True,
        broker_transport_options={
            "visibility_timeout": 3,
            "unacked_restore_interval": 1,
            "polling_interval": poll_s,
        },
    )

    @app.task(name="work", ignore_result=True)  # type: ignore[untyped-decorator]  # Celery has no types
    def work(number: int, seconds: float = 0.0) -> None:
        with redis.Redis.from_url(url) as client:
            client.incr(f"begun:{number}")
            time.sleep(seconds)
            client.incr(f"done:{number}")

    return app, work


if __name__ == "__main__":
    app, _ = make_plain(sys.argv[1], *map(float, sys.argv[2:]))
    options = {"pool": "threads", "concurrency": 4, "without_gossip": True, "without_mingle": True, "quiet": True}
    worker = app.Worker(hostname="plain@here", **options)
    worker.start()
    sys.exit(int(worker.exitcode or 0))
