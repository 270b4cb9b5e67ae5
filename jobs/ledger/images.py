"""Images of a job in the ledger: their states, failures and notes, by index."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping

from jobs.errors import JobError
from jobs.job import ImageState
from jobs.ledger.connection import Connection, flatten
from jobs.results import Failure, ImageNote


@dataclasses.dataclass(frozen=True)
class ImageResult:
    """`reopened`: how often the image was reopened, modulo 256; counted only where the job's webhook gets image events.
    `failure`: only while the ledger holds it."""

    state: ImageState
    reopened: int
    failure: Failure | None


class Images:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def states(self, job_id: str, first: int, count: int) -> list[ImageState]:
        """Return the states of `count` images from index `first` on."""
        start, end = first // 2, (first + count + 1) // 2
        found = self._connection.get_range(f"cf:job:{job_id}:bits", start, end)
        nibbles = [nibble for byte in found for nibble in (byte >> 4, byte & 15)]
        offset = first - 2 * start
        return [ImageState(value) for value in nibbles[offset : offset + count]]

    def uncertain_versions(self, job_id: str, first: int, count: int) -> list[bool]:
        """Return for each of `count` images from index `first` on whether its outputs may be made from another version
        than the manifest names."""
        start, end = first // 8, (first + count + 7) // 8
        found = self._connection.get_range(f"cf:job:{job_id}:unsure", start, end)
        bits = [bool(byte >> (7 - bit) & 1) for byte in found for bit in range(8)]
        return bits[first - 8 * start :][:count]

    def result(self, job_id: str, index: int) -> ImageResult:
        state, reopened, failure = self._connection.run("outcome", job_id, index)
        return ImageResult(ImageState(state), reopened, Failure.from_json(failure) if failure else None)

    def failure(self, job_id: str, index: int) -> Failure | None:
        text = self._connection.call("hget", f"cf:job:{job_id}:failures", str(index))
        return Failure.from_json(text) if text else None

    def failures(self, job_id: str) -> Iterator[tuple[int, Failure]]:
        """Yield index and failure in no order; a row may come twice."""
        for index, text in self._connection.scan_hash(f"cf:job:{job_id}:failures"):
            yield int(index), Failure.from_json(text)

    def count_failures(self, job_id: str) -> int:
        """Return how many failures the ledger holds; others are in S3."""
        return int(self._connection.call("hlen", f"cf:job:{job_id}:failures"))

    def notes(self, job_id: str) -> dict[int, ImageNote]:
        """Return notes worth reading by index: those of the first ten thousand such images."""
        fields = self._connection.call("hgetall", f"cf:job:{job_id}:remarks")
        return {int(index): ImageNote(**json.loads(fields[index])) for index in sorted(fields, key=int)}

    def unrecorded_rows(self, job_id: str, *, first: int, count: int) -> list[str]:
        """Return manifest lines of a live job that are in no part yet, skipping the first `first` of them."""
        return list(self._connection.call("lrange", f"cf:job:{job_id}:rows", first, first + count - 1))

    def reopen(self, job_id: str, indexes: Iterable[int], *, states: Iterable[ImageState]) -> int:
        """Reopen images in one of the final `states`: they are fed once more, in the version that their source has
        then. At most `MAX_ROWS`. Return how many. Raises `JobError` when the job is cancelled."""
        digits = "".join(str(int(state)) for state in states)
        changed = int(self._connection.run("reopen", job_id, digits, *indexes))
        if changed < 0:
            raise JobError(f"Job {job_id} was cancelled: submit its source again.", code="job_cancelled")
        return changed

    def restore(self, job_id: str, states: Mapping[int, ImageState]) -> int:
        """Make open images final that S3 proves to be so, except those in the window. At most `MAX_ROWS`. Return how
        many changed."""
        flat = flatten({str(index): int(state) for index, state in states.items()})
        return int(self._connection.run("restore", job_id, *flat))
