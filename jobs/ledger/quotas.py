"""Quotas and reservations of the HTTP API."""

from __future__ import annotations

from jobs.ledger.connection import Connection

_DAY_S = 86_400


class Quotas:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def reserve(self, name: str, value: str) -> str:
        """Keep `value` under `name` for a day unless the name is taken; return the value that is kept."""
        kept = self._connection.call("set", f"cf:api:once:{name}", value, nx=True, get=True, ex=_DAY_S)
        return str(kept or value)

    def count_call(self, caller: str, minute: int) -> int:
        """Count a call; return how many the caller has made in this minute."""
        key = f"cf:api:calls:{caller}:{minute}"
        self._connection.call("set", key, 0, nx=True, ex=120)
        return int(self._connection.call("incr", key))

    def lease_listing(self, job_id: str, process: str, *, ttl_s: float) -> bool:
        """Take or renew the lease on listing a job. Return False while another process has it."""
        key, ttl_ms = f"cf:api:lists:{job_id}", int(ttl_s * 1000)
        holder = self._connection.call("set", key, process, nx=True, get=True, px=ttl_ms)
        if holder == process:
            self._connection.call("pexpire", key, ttl_ms)
        return holder in (None, process)
