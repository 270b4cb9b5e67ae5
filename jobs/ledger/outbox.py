"""The outbox: webhook events that wait for delivery, one queue for each receiver."""

from __future__ import annotations

import dataclasses

from jobs.ledger.connection import Connection


@dataclasses.dataclass(frozen=True)
class Event:
    """`id`: a job's, when it closed, or an image's, when it is final. `receiver`: the same for all jobs with the same
    URL. `tries`: failed deliveries. `lease_ends`: as the ledger wrote it; proves that the event is still ours."""

    receiver: str
    id: str
    tries: int
    lease_ends: str


class Outbox:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def due_receivers(self, *, limit: int) -> list[str]:
        """Return receivers with due events, the one that waits longest first."""
        return list(self._connection.run("receivers_due", limit))

    def take(self, receiver: str, *, limit: int, lease_s: float) -> list[Event]:
        """Lease due events of a receiver: no other process gets them before the lease ends."""
        flat = iter(self._connection.run("take_events", receiver, limit, lease_s))
        return [Event(receiver, event, int(tries), ends) for event, tries, ends in zip(flat, flat, flat, strict=True)]

    def finish(self, event: Event, *, delivered: bool) -> None:
        """Remove an event that is delivered or given up. Changes nothing when its lease is lost or it happened
        again."""
        outcome = "sent" if delivered else "given_up"
        self._connection.run("delivered", event.receiver, event.id, event.lease_ends, outcome, 0)

    def retry_later(self, event: Event, *, pause_s: float) -> None:
        self._connection.run("delivered", event.receiver, event.id, event.lease_ends, "later", round(pause_s, 3))

    def replay_images(self, job_id: str, first: int, end: int) -> tuple[int, int]:
        """Make the events of final images in [first, end) due again, up to the outbox's limit. Return how many, and the
        index to continue from when fewer events wait."""
        count, reached = self._connection.run("retell", job_id, first, end)
        return int(count), int(reached)

    def replay_job(self, job_id: str) -> bool:
        """Make the event of a closed job due again. Return False when it is not closed."""
        return bool(self._connection.run("retell_job", job_id))
