"""The window: images that are queued, leased by a worker, or waiting for a retry. What a worker does with one: claim,
renew, finish or give back."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from jobs.job import ImageState
from jobs.ledger.connection import Connection, flatten
from jobs.results import Failure, ImageNote, Usage

MESSAGES_PER_CALL = 2000
"""Messages read in one round trip: a millisecond or two of Redis."""
_UNACKED = "unacked"
"""kombu's hash of messages that are delivered and not acknowledged."""
_CORRELATION = re.compile(r'"correlation_id": ?"([^"]+)"')


class ClaimOutcome(enum.StrEnum):
    GO = "go"  # the image and its output belong to this token now
    BUSY = "busy"  # another worker has the image, or it waits for a retry
    TAKEN = "taken"  # another image has the output; the message comes again later
    SUSPECT = "suspect"  # only for a worker in isolation; the image is on the suspect queue now
    FINAL = "final"  # the image is final already
    CANCELLED = "cancelled"  # its job is cancelled
    GONE = "gone"  # the ledger does not know its job, or the image is not in the window


class Recorded(enum.StrEnum):
    """Answer to what a worker records about an image that it claimed."""

    OK = "ok"
    FINAL = "final"  # the image was final before
    STALE = "stale"  # the token does not hold the image any more; nothing changed


class Place(enum.StrEnum):
    LEASED = "leased"
    WAITING = "waiting"  # on a queue
    RETRY = "retry"


@dataclasses.dataclass(frozen=True)
class Claim:
    """`waited_s`: from the publishing of its message to the claim. `lost_workers`: workers that vanished while they
    held it; `last_error`: the error of the last one, if known. `died`: workers that were killed while they computed it
    in isolation."""

    outcome: ClaimOutcome
    image: str
    token: str
    tries: int = 0
    lost_workers: int = 0
    waited_s: float | None = None
    last_error: str = ""
    died: int = 0


@dataclasses.dataclass(frozen=True)
class Survey:
    """Images in the window by place. `queues`: name -> length, and age of the oldest message in seconds."""

    waiting: int
    leased: int
    retry: int
    queues: Mapping[str, tuple[int, float]]


class Window:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def claim(self, image: str, *, token: str, output: str, lease_s: float, isolated: bool = False) -> Claim:
        """Claim an image. Idempotent for one token. `output`: s3:// name that only the holder may write. `isolated`:
        the worker does nothing else meanwhile, so it may take a suspect."""
        outcome, *counts = self._connection.run("claim", image, token, output, lease_s, int(isolated))
        if not counts:
            return Claim(ClaimOutcome(outcome), image, token)
        tries, lost, waited_s, error, died = counts
        return Claim(
            ClaimOutcome(outcome), image, token, tries, lost, float(waited_s) if waited_s else None, error, died
        )

    def renew(self, leases: Mapping[str, str], *, lease_s: float) -> list[str]:
        """Renew leases. `leases`: image -> token. Return the images whose lease is lost."""
        return list(self._connection.run("renew", lease_s, *flatten(leases))) if leases else []

    def finish(
        self,
        claim: Claim,
        state: ImageState,
        failure: Failure | None = None,
        *,
        note: ImageNote | None = None,
        usage: Usage | None = None,
    ) -> Recorded:
        """Make an image final. Idempotent: counted once."""
        error = failure.to_json() if failure else ""
        stored = note.to_json() if note and note.is_notable else ""
        counts = (note.counts() if note else {}) | (usage.counts() if usage else {})
        row = (claim.image, claim.token, int(state), error, stored, *flatten(counts))
        return Recorded(self._connection.run("finish", *row))

    def retry_later(self, claim: Claim, *, pause_s: float) -> Recorded:
        """Use up one attempt; the dispatcher publishes the image again after `pause_s`."""
        return Recorded(self._connection.run("defer", claim.image, claim.token, round(pause_s, 3)))

    def release(self, claim: Claim, *, lease_s: float) -> Recorded:
        """Give the image back to its queue without using up an attempt."""
        return Recorded(self._connection.run("release", claim.image, claim.token, lease_s))

    def report_crash(self, claim: Claim, error: str, *, lease_s: float) -> Recorded:
        """Record that this process ends with `error`, perhaps because of this image: the image is requeued at once, and
        counts one more lost worker."""
        return Recorded(self._connection.run("vanish", claim.image, claim.token, error, lease_s))

    def mark_isolated(self, claim: Claim, *, begins: bool) -> Recorded:
        """Mark that the image is computed in isolation, or not any more. A worker that vanishes between both marks
        counts in `Claim.died`."""
        return Recorded(self._connection.run("computing", claim.image, claim.token, int(begins)))

    def find_images(self, images: Sequence[str]) -> set[str]:
        """Return those of `images` that are in the window."""
        found = self._connection.call("hmget", "cf:entry", images) if images else []
        return {image for image, entry in zip(images, found, strict=True) if entry is not None}

    def place(self, image: str) -> Place | None:
        """Return None when the image is not in the window."""
        for place in Place:
            if self._connection.call("zscore", f"cf:{place}", image) is not None:
                return place
        return None

    def entries(self) -> Iterator[tuple[str, str]]:
        """Yield image and message of everything in the window, in no order."""
        for image, entry in self._connection.scan_hash("cf:entry"):
            yield image, entry.partition("\n")[2]

    def survey(self, queues: Sequence[str]) -> Survey:
        """Takes constant time for each queue, whatever its length."""
        waiting, leased, retry, *rows = self._connection.run("survey", *queues)
        sizes = zip(rows[::2], (float(age) for age in rows[1::2]), strict=True)
        return Survey(waiting, leased, retry, dict(zip(queues, sizes, strict=True)))

    def queue_length(self, queue: str) -> int:
        """Return the number of messages on a queue, without unacknowledged ones."""
        return int(self._connection.call("llen", queue))

    def images_with_message(self, queues: Iterable[str]) -> set[str]:
        """Return the images that have a message on one of `queues`, or an unacknowledged one."""
        messages = [text for queue in queues for text in self._messages(queue)]
        messages += self._connection.call("hvals", _UNACKED)  # after the queues: messages move from them to here
        return {found.group(1) for text in messages if (found := _CORRELATION.search(text))}

    def _messages(self, queue: str) -> Iterator[str]:
        """Read a queue in steps, from the end where messages are added: one that moves meanwhile is not missed."""
        for first in itertools.count(0, MESSAGES_PER_CALL):
            found = self._connection.call("lrange", queue, first, first + MESSAGES_PER_CALL - 1)
            yield from found
            if len(found) < MESSAGES_PER_CALL:
                return
