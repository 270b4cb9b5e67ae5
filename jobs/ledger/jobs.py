"""Jobs in the ledger: created, listed part by part, paused, tuned, cancelled; and read."""

from __future__ import annotations

import dataclasses
import itertools
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence

from jobs.errors import JobError
from jobs.job import ImageState, Job, ManifestPart
from jobs.ledger.connection import Connection, flatten, to_pairs
from jobs.message import Lane
from jobs.results import JobStats

MAX_LIVE = 1000
"""Most images of a live job that is published at once, without a manifest."""
JOBS_PER_CALL = 200
"""Jobs read in one round trip: a millisecond or two of Redis."""
_COUNTED = ("done", "failed", "skipped", "cancelled", "review", "window")


@dataclasses.dataclass(frozen=True)
class Inconsistencies:
    """`counts`: name -> (stored, recounted), where they differ. `leftovers`: final images that still have a message or
    a claim."""

    counts: Mapping[str, tuple[int, int]]
    leftovers: Sequence[str]


class Jobs:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(self, job: Job, **more: str | int | float) -> bool:
        """Return False, and change nothing, when the job exists. `more`: fields to begin with."""
        return bool(self._connection.run("create", job.id, *flatten(job.to_fields() | more)))

    def create_live(self, job: Job, rows: Sequence[tuple[str, str, str]], *, lease_s: float) -> bool:
        """Create a job of at most `MAX_LIVE` images, all queued, in one step. Rows: queue, message, manifest line.
        Return False, and change nothing, when the job exists."""
        flat = [text for row in rows for text in row]
        return bool(self._connection.run("submit", job.id, lease_s, len(rows), *flat, *flatten(job.to_fields())))

    def take_listing(self, job_id: str) -> str:
        """Become the job's lister; return a token for `add_part`. The previous lister can't add parts any more."""
        lister = uuid.uuid4().hex
        self._connection.run("take_listing", job_id, lister)
        return lister

    def is_next_part(self, job_id: str, number: int, *, lister: str | None = None) -> bool:
        """Whether part `number` is the next to be counted, and `lister` still lists the job."""
        parts, current = self._connection.call("hmget", _key(job_id), "parts", "lister")
        return bool(parts == str(number) and lister in (None, current))

    def add_part(
        self,
        job_id: str,
        lister: str,
        part: ManifestPart,
        *,
        first: int = 0,
        skipped: Sequence[bool] = (),
        fingerprint: str = "",
    ) -> bool:
        """Count a part that is in S3. Idempotent. Return False when another part was expected, or another process lists
        this job. `skipped`: for each image from the even index `first` on, whether it is skipped, made by
        `fingerprint`."""
        nibbles = [ImageState.SKIPPED if is_skipped else ImageState.OPEN for is_skipped in skipped]
        nibbles += [ImageState.OPEN] * (len(nibbles) % 2)
        states = bytes(high << 4 | low for high, low in zip(nibbles[::2], nibbles[1::2], strict=True))
        row = (job_id, lister, part.number, part.count, part.first, part.last)
        return bool(self._connection.run("add_part", *row, sum(skipped), first // 2, states, fingerprint))

    def finish_listing(self, job_id: str) -> None:
        self._connection.run("listed", job_id)

    def pause(self, job_id: str, reason: str) -> None:
        """Feed no more images; those that are fed go on."""
        self._connection.run("pause", job_id, reason)

    def unpause(self, job_id: str) -> bool:
        """Return False when the job was not paused."""
        return bool(self._connection.run("unpause", job_id))

    def cancel(self, job_id: str) -> bool:
        """Let images in work finish; the dispatcher makes the others final. Return False when the job is closed."""
        return bool(self._connection.run("cancel", job_id))

    def tune(
        self, job_id: str, *, weight: int | None = None, rate: float | None = None, lane: Lane | None = None
    ) -> bool:
        """Change how the job is fed from now on. None: no change; a rate of 0 removes the limit. Return False when the
        job is closed."""
        wanted = {"weight": weight, "rate": "" if rate == 0 else rate, "lane": lane}
        changed = {name: value for name, value in wanted.items() if value is not None}
        return bool(self._connection.run("tune", job_id, *flatten(changed)))

    def check(self, job_id: str, *, repair: bool) -> Inconsistencies:
        """Compare the job's counts, claims and messages with the states of its images, in one step; correct them if
        `repair`."""
        recounted, stored, leftovers = self._connection.run("check", job_id, int(repair))
        rows = zip(_COUNTED, (int(count or 0) for count in stored), map(int, recounted), strict=True)
        wrong = {name: (was, is_now) for name, was, is_now in rows if was != is_now}
        return Inconsistencies(wrong, list(leftovers))

    def get(self, job_id: str) -> Job:
        """Raises `JobError` when there is no such job."""
        found = self.find(job_id)
        if found is None:
            raise self._unknown(job_id)
        return found

    def find(self, job_id: str) -> Job | None:
        fields = self._connection.call("hgetall", _key(job_id))
        return Job.from_fields(job_id, fields) if fields else None

    def look(self, job_id: str) -> tuple[Job, JobStats, dict[str, dict[str, str]]]:
        """Return the job, its stats and the workers' heartbeats, in one round trip. Raises `JobError` when there is no
        such job."""
        fields, counts, workers = self._connection.run("look", job_id)
        if not fields:
            raise self._unknown(job_id)
        stats = JobStats.from_counts({name: int(count) for name, count in to_pairs(counts).items()})
        return Job.from_fields(job_id, to_pairs(fields)), stats, {node: to_pairs(beat) for node, beat in workers}

    def stats(self, job_id: str) -> JobStats:
        counts = self._connection.call("hgetall", f"{_key(job_id)}:tally")
        return JobStats.from_counts({name: int(count) for name, count in counts.items()})

    def newest(self, *, limit: int = 100) -> list[Job]:
        """Newest first. Reads no more names than it needs."""
        steps = itertools.count(0, JOBS_PER_CALL)
        pages = (self._connection.call("zrevrange", "cf:jobs", first, first + JOBS_PER_CALL - 1) for first in steps)
        found = (job for names in itertools.takewhile(bool, pages) for job in self._read(names))
        return list(itertools.islice(found, limit))

    def all(self) -> Iterator[Job]:
        """Yield the jobs that exist now, newest first. A job that is forgotten meanwhile hides no other."""
        names = self._connection.call("zrevrange", "cf:jobs", 0, -1)
        for first in range(0, len(names), JOBS_PER_CALL):
            yield from self._read(names[first : first + JOBS_PER_CALL])

    def open(self) -> list[Job]:
        """Return the jobs that are not closed, oldest first."""
        names = sorted(self._connection.call("smembers", "cf:open"))
        pages = (names[first : first + JOBS_PER_CALL] for first in range(0, len(names), JOBS_PER_CALL))
        return [job for page in pages for job in self._read(page)]

    def parts(self, job_id: str) -> list[ManifestPart]:
        fields = self._connection.call("hgetall", f"{_key(job_id)}:parts")
        found = (ManifestPart(int(number), *json.loads(text)) for number, text in fields.items())
        return sorted(found, key=lambda part: part.number)

    def _read(self, job_ids: Sequence[str]) -> Iterator[Job]:
        """In one round trip; without jobs that are forgotten."""
        found = self._connection.get_hashes([_key(job_id) for job_id in job_ids])
        yield from (Job.from_fields(job_id, fields) for job_id, fields in zip(job_ids, found, strict=True) if fields)

    def _unknown(self, job_id: str) -> JobError:
        return JobError(
            f"There is no job {job_id!r} on {self._connection.name}. `cutfleet jobs` lists them; a closed job is kept "
            "for CUTFLEET_KEEP_DAYS, its report in S3 for ever."
        )


def _key(job_id: str) -> str:
    return f"cf:job:{job_id}"
