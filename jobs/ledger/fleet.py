"""Heartbeats of the workers."""

from __future__ import annotations

import collections
from collections.abc import Mapping

from jobs.ledger.connection import Connection, flatten, to_pairs
from jobs.message import RENDER_POOL

Heartbeat = Mapping[str, str]
"""Fields of one worker as text; `workers/process/heartbeat.py` lists them."""


class Fleet:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def heartbeat(self, node: str, fields: Mapping[str, str | int | float], *, ttl_s: int) -> None:
        """Replace the heartbeat of a worker; it expires after `ttl_s`."""
        self._connection.run("heartbeat", node, ttl_s, *flatten(fields))

    def workers(self) -> dict[str, dict[str, str]]:
        """Return the heartbeats of live workers by node name."""
        return {node: to_pairs(fields) for node, fields in self._connection.run("workers")}


def count_workers(workers: Mapping[str, Heartbeat]) -> collections.Counter[str]:
    """Count the workers that serve each model. A worker on a CPU also counts for `RENDER_POOL`."""
    served = collections.Counter(beat["model"] for beat in workers.values())
    return served + collections.Counter({RENDER_POOL: sum(beat.get("renders") == "1" for beat in workers.values())})
