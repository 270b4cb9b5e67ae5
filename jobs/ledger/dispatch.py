"""What the active dispatcher does. Each script checks the fencing token `epoch`: a dispatcher that lost its lock
changes nothing, and gets `Fenced`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from jobs.job import ManifestPart
from jobs.ledger.connection import MAX_ROWS, Connection, flatten
from jobs.results import Failure

FEED_ROWS = 100
"""Rows of one `feed`, at 26 us each: other clients wait at most 3 ms."""
CANCEL_ROWS = 16_384
"""Images of one `cancel_next`: 10 us if none was fed, 2 ms if states alternate. Must be even."""


class Dispatch:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def lead(self, dispatcher: str, *, ttl_s: float) -> int | None:
        """Become or stay the active dispatcher. Return the fencing token, or None while another one is active."""
        epoch = self._connection.run("lead", dispatcher, int(ttl_s * 1000))
        return int(epoch) if epoch else None

    def resign(self, dispatcher: str) -> None:
        """Release the lock, so that a standby need not wait for it to expire."""
        self._connection.run("resign", dispatcher)

    def is_active(self) -> bool:
        """Whether any dispatcher holds the lock."""
        return bool(self._connection.call("exists", "cf:dispatcher"))

    def check_lock(self, epoch: int) -> None:
        """Raises `Fenced` when another dispatcher is active."""
        self._connection.run("still", epoch)

    def check_not_full(self, epoch: int) -> None:
        """Raises `RedisFull` when Redis would refuse a new image."""
        self._connection.run("room", epoch)

    def pause(self, epoch: int, job_id: str, reason: str) -> None:
        """Pause a job as `Jobs.pause` does."""
        self._connection.run("hold", epoch, job_id, reason)

    def skip_final(self, epoch: int, job_id: str, cursor: int, to: int) -> bool:
        """Move the cursor over images that are final. Return False when it was elsewhere."""
        return bool(self._connection.run("pass_over", epoch, job_id, cursor, to))

    def feed(
        self, epoch: int, job_id: str, cursor: int, rows: Sequence[tuple[str, str]], *, lease_s: float
    ) -> int | None:
        """Queue the next images, except final ones; return how many. Rows: queue and message, or an empty queue and the
        failure of an image that no worker shall try. None: the cursor was elsewhere, or the job is paused."""
        fed = self._connection.run("feed", epoch, job_id, cursor, lease_s, *[text for row in rows for text in row])
        return None if fed is None else int(fed)

    def reopened_images(self, job_id: str, limit: int) -> list[int]:
        """Return the first indexes of reopened images that wait to be fed."""
        return [int(index) for index in self._connection.run("to_feed_again", job_id, limit)]

    def feed_reopened(self, epoch: int, job_id: str, rows: Mapping[int, tuple[str, str]], *, lease_s: float) -> int:
        """Queue reopened images. Rows: index -> queue, message. Return how many."""
        flat = [text for index, row in rows.items() for text in (index, *row)]
        return int(self._connection.run("feed_again", epoch, job_id, lease_s, *flat)) if flat else 0

    def record_part(self, epoch: int, job_id: str, part: ManifestPart) -> bool:
        """Count a part of a live job's manifest that is in S3; drop its rows from Redis. Return False when another part
        was expected."""
        return bool(self._connection.run("record", epoch, job_id, part.number, part.count, part.first, part.last))

    def release_retries(self, epoch: int, *, lease_s: float) -> int:
        """Publish images whose retry is due."""
        return int(self._connection.run("retry_due", epoch, lease_s, MAX_ROWS))

    def reclaim_expired(self, epoch: int, *, lease_s: float) -> list[str]:
        """Requeue images whose lease has expired; return them."""
        return list(self._connection.run("reclaim", epoch, lease_s, MAX_ROWS))

    def overdue(self, epoch: int) -> list[str]:
        """Return unclaimed images past their deadline; `requeue_lost` decides about each."""
        return list(self._connection.run("overdue", epoch, MAX_ROWS))

    def requeue_lost(self, epoch: int, has_message: Mapping[str, bool], *, lease_s: float) -> int:
        """Extend the deadline of images that have a message; publish the others again. Return how many of those."""
        flat = flatten({image: str(int(exists)) for image, exists in has_message.items()})
        return int(self._connection.run("look_again", epoch, lease_s, *flat)) if flat else 0

    def cancel_window(self, epoch: int, job_id: str) -> set[int]:
        """Make a cancelled job's images in the window final, except leased ones; return the indexes of those."""
        leased: set[int] = set()
        cursor = "0"
        while True:
            cursor, *found = self._connection.run("cancel_fed", epoch, job_id, cursor, FEED_ROWS)
            leased.update(map(int, found))
            if cursor == "0":
                return leased

    def cancel_next(self, epoch: int, job_id: str, cursor: int, leased: Iterable[int]) -> int | None:
        """Make the next `CANCEL_ROWS` images of a cancelled job final, except `leased` ones. Return the new cursor;
        None: it was elsewhere."""
        left = " ".join(str(index) for index in leased if cursor <= index < cursor + CANCEL_ROWS)
        to = self._connection.run("cancel_rest", epoch, job_id, cursor, CANCEL_ROWS, left)
        return None if to is None else int(to)

    def drop_spilled(self, epoch: int, job_id: str, number: int, failures: Mapping[int, Failure]) -> bool:
        """Drop failures that are in S3 as part `number`. Return False when another part was expected."""
        flat = [text for index, failure in failures.items() for text in (index, json.dumps(failure.at))]
        return bool(self._connection.run("spilled", epoch, job_id, number, *flat))

    def close(self, epoch: int, job_id: str, *, keep_s: float) -> bool:
        """Close a job whose images are all final; Redis forgets it after `keep_s`. Return False otherwise."""
        return bool(self._connection.run("close", epoch, job_id, int(keep_s)))
