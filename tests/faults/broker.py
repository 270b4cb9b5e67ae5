"""Reads the state of Celery's broker with a plain Redis client."""

from __future__ import annotations

import json

import redis


def count_waiting_workers(client: redis.Redis, *, db: int = 0) -> int:
    """Count the workers that wait in BRPOP: the server gives a message to one of them even if its process is frozen."""
    return sum(
        found["db"] == str(db) and found["cmd"] == "brpop" and "b" in found["flags"] for found in client.client_list()
    )


def has_redelivered_message(client: redis.Redis) -> bool:
    """Whether an unacknowledged message was delivered before: kombu marks such messages."""
    unacknowledged: list[str] = client.hvals("unacked")  # type: ignore[assignment]  # the types cover asyncio too
    return any(json.loads(text)[0]["headers"].get("redelivered") for text in unacknowledged)
