"""Watches: which versions of which keys a watch has put into jobs, and when it last listed its prefix."""

from __future__ import annotations

import enum
from collections.abc import Sequence

from jobs.job import Job
from jobs.ledger.connection import MAX_ROWS, Connection, flatten


class Appended(enum.StrEnum):
    OK = "ok"
    MOVED = "moved"  # another process appended first; nothing changed: read total and ETags again
    OVER = "over"  # the job takes no more images


class Watches:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def append_images(
        self, job: Job, rows: Sequence[tuple[str, str, str, str, str, str]], *, lease_s: float
    ) -> Appended:
        """Add images to a watch's job, which is created if needed; their indexes start at `job.total`. Rows: digest of
        the key, ETag that `seen_etags` returned, ETag now, queue, message, manifest line."""
        flat = [text for row in rows for text in row]
        fields = flatten(job.to_fields())
        answer = self._connection.run("append", job.id, job.watch, lease_s, job.total, len(rows), *flat, *fields)
        return Appended(answer)

    def seen_etags(self, watch: str, digests: Sequence[str]) -> list[str]:
        """Return for each key the ETag of the last version that `append_images` took; empty if none."""
        found = self._connection.call("hmget", f"cf:watch:{watch}:seen", digests) if digests else []
        return [etag or "" for etag in found]

    def last_sweep(self, watch: str) -> float | None:
        """Return when the last complete listing began, as Unix time."""
        found = self._connection.call("hget", f"cf:watch:{watch}", "swept")
        return float(found) if found else None

    def finish_sweep(self, watch: str, *, began: float, keep_s: float) -> None:
        """Record a complete listing; forget versions that were taken more than `keep_s` before it."""
        while self._connection.run("swept", watch, round(began, 3), keep_s, MAX_ROWS) == MAX_ROWS:
            pass
