"""The control of the fault tests: a plain Celery task with late acknowledgement and no ledger.

    python tests/faults/plain_celery.py REDIS_URL [POLL_S]

runs its worker with unpatched kombu. Each finished message N sets `done:N` in Redis. POLL_S: timeout of one BRPOP, one
second otherwise. With a long one, the server gives a message to a worker that is frozen in BRPOP.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import redis
from celery import Celery


def make_plain_app(url: str, poll_s: float | None = None) -> tuple[Celery, Any]:
    """Return the app and its task `work(number, seconds)`."""
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
    app, _ = make_plain_app(sys.argv[1], *map(float, sys.argv[2:]))
    options = {"pool": "threads", "concurrency": 4, "without_gossip": True, "without_mingle": True, "quiet": True}
    worker = app.Worker(hostname="plain@here", **options)
    worker.start()
    sys.exit(int(worker.exitcode or 0))
