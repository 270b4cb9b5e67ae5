"""Ledger: the truth about each job, in Redis. Each move is one atomic step of `ledger.lua`, whose head lists every key.

An image is open until it is final; final never changes back but by an explicit retry. Counts change only with a state.
Redis keeps no result for a done image but four bits: what was published stands in S3.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import itertools
import json
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from redis.exceptions import RedisError

from jobs.errors import CutfleetError, JobError
from jobs.job import Effort, Failure, ImageState, Job, ManifestPart, Remark, Tally, job_from_fields
from jobs.ledger.connection import connect, map_redis_error
from jobs.message import Lane

MAX_ROWS = 500
"""Most rows of one move: far below Lua's limit of arguments."""
FEED_ROWS = 100
"""Rows of one `feed`, at 26 us each: nobody waits for longer than 3 ms because of it."""
CANCEL_ROWS = 16_384
"""Images of one `cancel_rest`: 10 us where none was fed, 2 ms where each has a neighbour of another state. Even."""
JOBS_AT_ONCE, MESSAGES_AT_ONCE = 200, 2000
"""Per round trip: a millisecond or two of Redis."""
MAX_LIVE = 1000
"""Most images of a live job that is published at once, without a manifest."""


_ALLOW_OOM = "#!lua flags=allow-oom\n"
_NEVER_REFUSED = {"claim", "renew", "finish", "defer", "release", "vanish", "computing", "heartbeat", "delivered"}
_NEVER_REFUSED |= {
    "outcome",
    "lead",
    "still",
    "hold",
    "resign",
    "close",
    "cancel",
    "cancel_fed",
    "cancel_rest",
    "spilled",
    "record",
    "listed",
    "pause",
    "unpause",
}
"""Moves that a full Redis takes all the same: they free memory, or take a little for what is in work already, so that
workers and dispatcher end what they hold and there is room again."""
_COUNTED = ("done", "failed", "skipped", "cancelled", "review", "window")
_UNACKED = "unacked"  # kombu's hash of messages that workers hold
_CORRELATION = re.compile(r'"correlation_id": ?"([^"]+)"')


@dataclasses.dataclass(frozen=True)
class Claim:
    """`verdict`: go, busy, taken, suspect, final, cancelled or gone; only with go is the image ours, under `token`.
    `waited_s`: from the publishing of its message to the claim. `vanished`: workers that went down with it; `blamed`:
    the last one's error, where it is known. `died`: those that fell silent while they computed it alone."""

    verdict: str
    image: str
    token: str
    tries: int = 0
    vanished: int = 0
    waited_s: float | None = None
    blamed: str = ""
    died: int = 0


@dataclasses.dataclass(frozen=True)
class Survey:
    """What is in the window: `waiting` on a queue, `leased`, due for a `retry` later. `queues`: name -> length, and
    age of the oldest message in seconds."""

    waiting: int
    leased: int
    retry: int
    queues: Mapping[str, tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Event:
    """Something to tell a webhook: a job was closed (`id` is the job's) or an image is final (`id` is the image's).
    `receiver`: all jobs with the same URL have the same. `tries`: deliveries that failed. `lease_ends`, as the ledger
    wrote it, shows that it is ours."""

    receiver: str
    id: str
    tries: int
    lease_ends: str


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What there is to tell of an image. `reopened`: how often it was opened again, modulo 256; counted where the job's
    webhook is told of images. `failure`: only while the ledger holds it."""

    state: ImageState
    reopened: int
    failure: Failure | None


@dataclasses.dataclass(frozen=True)
class Check:
    """What is wrong in the books of a job. `counts`: name -> what was kept, what it should be. `left`: final images
    that still have a message or a claim."""

    counts: Mapping[str, tuple[int, int]]
    left: Sequence[str]


class Ledger:
    """One connection pool; may be shared by threads. Every method raises `ServiceUnavailable` when Redis fails us."""

    def __init__(self, url: str, *, name: str) -> None:
        """`name` stands for the server in messages (the URL without its password)."""
        self.name = name
        self.heard: Callable[[CutfleetError | None], None] = lambda _: None
        self._redis = connect(url)
        self._scripts = {move: self._redis.register_script(text) for move, text in _read_scripts().items()}

    def close(self) -> None:
        self._redis.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Jobs

    def create_job(self, job: Job, **more: str | int | float) -> bool:
        """False when the job is there already; nothing changes then. `more`: fields of the glossary to begin with."""
        return bool(self._move("create", job.id, *_flat(job.to_fields() | more)))

    def submit_live(self, job: Job, rows: Sequence[tuple[str, str, str]], *, lease_s: float) -> bool:
        """Creates a job of at most `MAX_LIVE` images, all on their queues, in one step. Rows: queue, message, line of
        the manifest."""
        flat = [text for row in rows for text in row]
        return bool(self._move("submit", job.id, lease_s, len(rows), *flat, *_flat(job.to_fields())))

    def append_live(self, job: Job, rows: Sequence[tuple[str, str, str, str, str, str]], *, lease_s: float) -> str:
        """More images for the job of a watch, which is made if it is not there; their indexes follow `job.total`. Rows:
        digest of the key, ETag that `seen` gave, ETag now, queue, message, line of the manifest. `ok`, `moved` (nothing
        changed: read total and what was seen again) or `over` (the job takes no more)."""
        flat = [text for row in rows for text in row]
        return str(
            self._move("append", job.id, job.watch, lease_s, job.total, len(rows), *flat, *_flat(job.to_fields()))
        )

    def seen(self, watch: str, digests: Sequence[str]) -> list[str]:
        """ETag of the last version of each key that `append_live` has put into a job, empty where there is none."""
        found = self._call("hmget", f"cf:watch:{watch}:seen", digests) if digests else []
        return [etag or "" for etag in found]

    def swept(self, watch: str) -> float | None:
        """When the last complete listing of what `watch` watches began."""
        found = self._call("hget", f"cf:watch:{watch}", "swept")
        return float(found) if found else None

    def finish_sweep(self, watch: str, *, began: float, keep_s: float) -> None:
        """Forgets what was seen more than `keep_s` before it."""
        while self._move("swept", watch, round(began, 3), keep_s, MAX_ROWS) == MAX_ROWS:
            pass

    def rows(self, job: str, *, first: int, count: int) -> list[str]:
        """Lines of the manifest of a live job that are in none of its parts yet, `first` of them passed over."""
        return list(self._call("lrange", f"cf:job:{job}:rows", first, first + count - 1))

    def take_listing(self, job: str) -> str:
        """Lists the job from now on: a token for `add_part`. Whoever listed it before adds nothing more."""
        lister = uuid.uuid4().hex
        self._move("take_listing", job, lister)
        return lister

    def is_next_part(self, job: str, number: int, *, lister: str | None = None) -> bool:
        """Whether part `number` is the next to be counted; and whether `lister` lists the job still."""
        parts, lists = self._call("hmget", f"cf:job:{job}", "parts", "lister")
        return bool(parts == str(number) and lister in (None, lists))

    def add_part(
        self, job: str, lister: str, part: ManifestPart, *, first: int = 0, known: Sequence[bool] = (), made: str = ""
    ) -> bool:
        """The part is in S3. False when another number was expected, or somebody else lists this job; safe to repeat.
        `known`: for each image, from the even index `first` on, whether it is skipped at once, as made by the
        fingerprint `made`."""
        nibbles = [
            ImageState.SKIPPED if is_known else ImageState.OPEN for is_known in (*known, *[False] * (len(known) % 2))
        ]
        states = bytes(high << 4 | low for high, low in zip(nibbles[::2], nibbles[1::2], strict=True))
        row = (job, lister, part.number, part.count, part.first, part.last)
        return bool(self._move("add_part", *row, sum(known), first // 2, states, made))

    def finish_listing(self, job: str) -> None:
        self._move("listed", job)

    def pause(self, job: str, reason: str) -> None:
        """What is fed goes on; nothing more is fed."""
        self._move("pause", job, reason)

    def unpause(self, job: str) -> bool:
        """False when it was not paused."""
        return bool(self._move("unpause", job))

    def cancel(self, job: str) -> bool:
        """What is in work ends; the dispatcher makes the rest final. False when the job is closed."""
        return bool(self._move("cancel", job))

    def reopen(self, job: str, images: Iterable[int], *, states: Iterable[ImageState]) -> int:
        """Images (by index) in one of the final `states` are fed once more, in whatever version their source has
        then. At most `MAX_ROWS`. Returns how many. Raises `JobError` when the job is cancelled."""
        digits = "".join(str(int(state)) for state in states)
        changed = int(self._move("reopen", job, digits, *images))
        if changed < 0:
            raise JobError(f"Job {job} was cancelled: submit its source again.", code="job_cancelled")
        return changed

    def to_feed_again(self, job: str, limit: int) -> list[int]:
        """The first of what `reopen` left to be fed, by index."""
        return [int(index) for index in self._move("to_feed_again", job, limit)]

    def restore(self, job: str, states: Mapping[int, ImageState]) -> int:
        """Open images (by index) that S3 proves to be final are so, but for those in the window. At most `MAX_ROWS`.
        Returns how many changed."""
        return int(self._move("restore", job, *_flat({str(i): int(state) for i, state in states.items()})))

    def check(self, job: str, *, repair: bool) -> Check:
        """Counts, claims and messages of a job against the states of its images, in one step."""
        counted, kept, left = self._move("check", job, int(repair))
        wrong = {
            name: (int(was or 0), int(is_now))
            for name, was, is_now in zip(_COUNTED, kept, counted, strict=True)
            if int(was or 0) != int(is_now)
        }
        return Check(wrong, list(left))

    def in_window(self, images: Sequence[str]) -> set[str]:
        """Those of `images` that are on a queue, in a worker's hands or to be tried again."""
        found = self._call("hmget", "cf:entry", images) if images else []
        return {image for image, entry in zip(images, found, strict=True) if entry is not None}

    def tune(self, job: str, *, weight: int | None = None, rate: float | None = None, lane: Lane | None = None) -> bool:
        """What is fed from now on; None leaves it, a rate of 0 lifts the limit. False when the job is closed."""
        wanted = {"weight": weight, "rate": "" if rate == 0 else rate, "lane": lane}
        return bool(
            self._move("tune", job, *_flat({name: value for name, value in wanted.items() if value is not None}))
        )

    def job(self, job: str) -> Job:
        """Raises `JobError` when there is none."""
        found = self.find_job(job)
        if found is None:
            raise self._unknown(job)
        return found

    def look(self, job: str) -> tuple[Job, Tally, dict[str, dict[str, str]]]:
        """A job, its tally, and `workers`, in one round trip. Raises `JobError` when there is no such job."""
        fields, counts, workers = self._move("look", job)
        if not fields:
            raise self._unknown(job)
        tally = Tally.of_counts({word: int(count) for word, count in _pairs(counts).items()})
        return job_from_fields(job, _pairs(fields)), tally, {node: _pairs(facts) for node, facts in workers}

    def find_job(self, job: str) -> Job | None:
        fields = self._call("hgetall", f"cf:job:{job}")
        return job_from_fields(job, fields) if fields else None

    def jobs(self, *, limit: int = 100) -> list[Job]:
        """Newest first, without reading more names than that takes."""
        steps = itertools.count(0, JOBS_AT_ONCE)
        pages = (self._call("zrevrange", "cf:jobs", first, first + JOBS_AT_ONCE - 1) for first in steps)
        found = (job for names in itertools.takewhile(bool, pages) for job in self._find_jobs(names))
        return list(itertools.islice(found, limit))

    def all_jobs(self) -> Iterator[Job]:
        """Newest first, of those that are known now: what is forgotten meanwhile hides no other."""
        names = self._call("zrevrange", "cf:jobs", 0, -1)
        for first in range(0, len(names), JOBS_AT_ONCE):
            yield from self._find_jobs(names[first : first + JOBS_AT_ONCE])

    def open_jobs(self) -> list[Job]:
        """Oldest first."""
        names = sorted(self._call("smembers", "cf:open"))
        pages = (names[first : first + JOBS_AT_ONCE] for first in range(0, len(names), JOBS_AT_ONCE))
        return [job for page in pages for job in self._find_jobs(page)]

    def parts(self, job: str) -> list[ManifestPart]:
        raw = self._call("hgetall", f"cf:job:{job}:parts")
        return sorted(
            (ManifestPart(int(n), *json.loads(text)) for n, text in raw.items()), key=lambda part: part.number
        )

    def part(self, job: str, number: int) -> ManifestPart:
        text = self._call("hget", f"cf:job:{job}:parts", str(number))
        return ManifestPart(number, *json.loads(text))

    def failures(self, job: str) -> Iterator[tuple[int, Failure]]:
        """In no order."""
        cursor = 0
        while True:
            cursor, rows = self._call("hscan", f"cf:job:{job}:failures", cursor, count=1000)
            for index, text in rows.items():
                yield int(index), Failure.of(json.loads(text))
            if not cursor:
                return

    def remarks(self, job: str) -> dict[int, Remark]:
        """By index, of images that a person should hear of: the first ten thousand that were done."""
        rows = self._call("hgetall", f"cf:job:{job}:remarks")
        return {int(index): Remark(**json.loads(rows[index])) for index in sorted(rows, key=int)}

    def tally(self, job: str) -> Tally:
        counts = self._call("hgetall", f"cf:job:{job}:tally")
        return Tally.of_counts({word: int(count) for word, count in counts.items()})

    def failure(self, job: str, index: int) -> Failure | None:
        text = self._call("hget", f"cf:job:{job}:failures", str(index))
        return Failure.of(json.loads(text)) if text else None

    def states(self, job: str, first: int, count: int) -> list[ImageState]:
        """States of `count` images from index `first` on."""
        start, end = first // 2, (first + count + 1) // 2
        raw: bytes = self._call("execute_command", "GETRANGE", f"cf:job:{job}:bits", start, end - 1, NEVER_DECODE=True)
        raw = raw.ljust(end - start, b"\0")
        nibbles = [nibble for byte in raw for nibble in (byte >> 4, byte & 15)]
        offset = first - 2 * start
        return [ImageState(value) for value in nibbles[offset : offset + count]]

    def place(self, image: str) -> str | None:
        """`leased`, `waiting` or `retry`; None when the image is in none of them."""
        for place in ("leased", "waiting", "retry"):
            if self._call("zscore", f"cf:{place}", image) is not None:
                return place
        return None

    def entries(self) -> Iterator[tuple[str, str]]:
        """Image and message of everything in the window, in no order."""
        cursor = 0
        while True:
            cursor, rows = self._call("hscan", "cf:entry", cursor, count=1000)
            for image, entry in rows.items():
                yield image, entry.partition("\n")[2]
            if not cursor:
                return

    # The HTTP API

    def reserve(self, name: str, value: str) -> str:
        """Keeps `value` under `name` for a day unless something is kept there; returns what is kept."""
        kept = self._call("set", f"cf:api:once:{name}", value, nx=True, get=True, ex=86_400)
        return str(kept or value)

    def count_call(self, caller: str, minute: int) -> int:
        """How many calls the caller has made in this minute, this one among them."""
        key = f"cf:api:calls:{caller}:{minute}"
        self._call("set", key, 0, nx=True, ex=120)
        return int(self._call("incr", key))

    def hold_listing(self, job: str, me: str, *, ttl_s: float) -> bool:
        """Whether `me` lists the job from now on, and nobody else for so long."""
        key = f"cf:api:lists:{job}"
        holder = self._call("set", key, me, nx=True, get=True, px=int(ttl_s * 1000))
        if holder == me:
            self._call("pexpire", key, int(ttl_s * 1000))
        return holder in (None, me)

    # What a worker does

    def claim(self, image: str, *, token: str, output: str, lease_s: float, alone: bool = False) -> Claim:
        """Safe to repeat with the same token. `output` is the s3:// name that only the holder may write. `alone`: the
        worker does nothing else meanwhile, so that it may have a suspect."""
        verdict, *counts = self._move("claim", image, token, output, lease_s, int(alone))
        if not counts:
            return Claim(verdict, image, token)
        tries, vanished, waited_s, blamed, died = counts
        return Claim(verdict, image, token, tries, vanished, float(waited_s) if waited_s else None, blamed, died)

    def renew(self, held: Mapping[str, str], *, lease_s: float) -> list[str]:
        """`held`: image -> token. Returns the images that are no longer held."""
        return list(self._move("renew", lease_s, *_flat(held))) if held else []

    def finish(
        self,
        claim: Claim,
        state: ImageState,
        failure: Failure | None = None,
        *,
        remark: Remark | None = None,
        effort: Effort | None = None,
    ) -> str:
        """`ok`, `final` (it was before) or `stale` (not held any more; nothing changed)."""
        text = failure.to_json() if failure else ""
        said = remark.to_json() if remark and remark.is_notable else ""
        counts = (remark.counts() if remark else {}) | (effort.counts() if effort else {})
        return str(self._move("finish", claim.image, claim.token, int(state), text, said, *_flat(counts)))

    def defer(self, claim: Claim, *, pause_s: float) -> str:
        """Uses up one try; the dispatcher publishes the image again after `pause_s`."""
        return str(self._move("defer", claim.image, claim.token, round(pause_s, 3)))

    def release(self, claim: Claim, *, lease_s: float) -> str:
        """Gives the image back, no try used up."""
        return str(self._move("release", claim.image, claim.token, lease_s))

    def vanish(self, claim: Claim, error: str, *, lease_s: float) -> str:
        """This process is going down with `error`, perhaps because of this image: at once what `reclaim` does later."""
        return str(self._move("vanish", claim.image, claim.token, error, lease_s))

    def compute_alone(self, claim: Claim, *, begins: bool) -> str:
        """Between both, a worker that falls silent counts as one that `died` of the image."""
        return str(self._move("computing", claim.image, claim.token, int(begins)))

    def heartbeat(self, node: str, facts: Mapping[str, str | int | float], *, ttl_s: int) -> None:
        self._move("heartbeat", node, ttl_s, *_flat(facts))

    def workers(self) -> dict[str, dict[str, str]]:
        """What the workers that are alive say of themselves, by node name."""
        return {node: _pairs(facts) for node, facts in self._move("workers")}

    # Webhooks

    def receivers_due(self, *, limit: int) -> list[str]:
        """Receivers that have events which are due, the one that waits longest first."""
        return list(self._move("receivers_due", limit))

    def take_events(self, receiver: str, *, limit: int, lease_s: float) -> list[Event]:
        """Events of a receiver that are due; nobody else gets them before the lease ends."""
        flat = iter(self._move("take_events", receiver, limit, lease_s))
        return [Event(receiver, event, int(tries), ends) for event, tries, ends in zip(flat, flat, flat, strict=True)]

    def finish_event(self, event: Event, *, told: bool) -> None:
        """Delivered, or given up. Nothing changes when the event is not ours any more or happened again meanwhile."""
        self._move("delivered", event.receiver, event.id, event.lease_ends, "sent" if told else "given_up", 0)

    def defer_event(self, event: Event, *, pause_s: float) -> None:
        self._move("delivered", event.receiver, event.id, event.lease_ends, "later", round(pause_s, 3))

    def outcome(self, job: str, index: int) -> Outcome:
        state, reopened, failure = self._move("outcome", job, index)
        return Outcome(ImageState(state), reopened, Failure.of(json.loads(failure)) if failure else None)

    def retell(self, job: str, first: int, end: int) -> tuple[int, int]:
        """Makes the events of the final images in [first, end) due again, up to the first that does not fit. Returns
        how many, and the index to go on from once fewer wait."""
        count, reached = self._move("retell", job, first, end)
        return int(count), int(reached)

    def retell_job(self, job: str) -> bool:
        """Makes the event of a closed job due again; False when it is not closed."""
        return bool(self._move("retell_job", job))

    # What the active dispatcher does

    def lead(self, me: str, *, ttl_s: float) -> int | None:
        """The fencing token while `me` is the active dispatcher, else None."""
        epoch = self._move("lead", me, int(ttl_s * 1000))
        return int(epoch) if epoch else None

    def check_leads(self, epoch: int) -> None:
        """Raises `Fenced` when another dispatcher is active."""
        self._move("still", epoch)

    def hold(self, epoch: int, job: str, reason: str) -> None:
        """As `pause`."""
        self._move("hold", epoch, job, reason)

    def check_room(self, epoch: int) -> None:
        """Raises `ServiceUnavailable` `redis_full` where a new image would be refused."""
        self._move("room", epoch)

    def resign(self, me: str) -> None:
        self._move("resign", me)

    def pass_over(self, epoch: int, job: str, cursor: int, to: int) -> bool:
        """The cursor moves over images that are final already. False when it was elsewhere."""
        return bool(self._move("pass_over", epoch, job, cursor, to))

    def unsure(self, job: str, first: int, count: int) -> list[bool]:
        """Of `count` images from `first` on, which may be made from another version than the manifest says."""
        start, end = first // 8, (first + count + 7) // 8
        key = f"cf:job:{job}:unsure"
        raw: bytes = self._call("execute_command", "GETRANGE", key, start, end - 1, NEVER_DECODE=True)
        bits = [bool(byte >> (7 - bit) & 1) for byte in raw.ljust(end - start, b"\0") for bit in range(8)]
        return bits[first - 8 * start :][:count]

    def feed(self, epoch: int, job: str, cursor: int, rows: Sequence[tuple[str, str]], *, lease_s: float) -> int | None:
        """Puts the next images on their queues but for final ones; how many. Rows: queue, message; or an empty queue,
        and the failure of an image that nobody is to try. None: the cursor was elsewhere, or paused."""
        fed = self._move("feed", epoch, job, cursor, lease_s, *[text for row in rows for text in row])
        return None if fed is None else int(fed)

    def record_part(self, epoch: int, job: str, part: ManifestPart) -> bool:
        """The first rows of a live job are in S3, as this part. False when another number was expected."""
        return bool(self._move("record", epoch, job, part.number, part.count, part.first, part.last))

    def retry_due(self, epoch: int, *, lease_s: float) -> int:
        return int(self._move("retry_due", epoch, lease_s, MAX_ROWS))

    def reclaim(self, epoch: int, *, lease_s: float) -> list[str]:
        """Images whose worker fell silent are on their queues again."""
        return list(self._move("reclaim", epoch, lease_s, MAX_ROWS))

    def overdue(self, epoch: int) -> list[str]:
        """Unclaimed images past their deadline; `look_again` decides about each."""
        return list(self._move("overdue", epoch, MAX_ROWS))

    def look_again(self, epoch: int, exists: Mapping[str, bool], *, lease_s: float) -> int:
        """Images whose message exists wait on; the others are published again. Returns how many those were."""
        flat = _flat({image: str(int(there)) for image, there in exists.items()})
        return int(self._move("look_again", epoch, lease_s, *flat)) if flat else 0

    def feed_again(self, epoch: int, job: str, rows: Mapping[int, tuple[str, str]], *, lease_s: float) -> int:
        """Rows: index -> queue, message. Returns how many went on their queues."""
        flat = [text for index, row in rows.items() for text in (index, *row)]
        return int(self._move("feed_again", epoch, job, lease_s, *flat)) if flat else 0

    def cancel_fed(self, epoch: int, job: str) -> set[int]:
        """What a cancelled job has in the window is final, but for what workers hold: returns the indexes of that."""
        held: set[int] = set()
        scan = "0"
        while True:
            scan, *found = self._move("cancel_fed", epoch, job, scan, FEED_ROWS)
            held.update(map(int, found))
            if scan == "0":
                return held

    def cancel_rest(self, epoch: int, job: str, cursor: int, held: Iterable[int]) -> int | None:
        """The next `CANCEL_ROWS` images of a cancelled job are final, but for those `held`. Returns how far it came;
        None: the cursor was elsewhere."""
        left = " ".join(str(index) for index in held if cursor <= index < cursor + CANCEL_ROWS)
        to = self._move("cancel_rest", epoch, job, cursor, CANCEL_ROWS, left)
        return None if to is None else int(to)

    def drop_spilled(self, epoch: int, job: str, number: int, failures: Mapping[int, Failure]) -> bool:
        """These failures stand in S3 by now, as part `number`. False when another part was expected."""
        flat = [text for index, failure in failures.items() for text in (index, json.dumps(failure.at))]
        return bool(self._move("spilled", epoch, job, number, *flat))

    def failures_held(self, job: str) -> int:
        return int(self._call("hlen", f"cf:job:{job}:failures"))

    def close_job(self, epoch: int, job: str, *, keep_s: float) -> bool:
        """True when every image was final and the job is closed now."""
        return bool(self._move("close", epoch, job, int(keep_s)))

    def queue_depth(self, queue: str) -> int:
        """Messages waiting; those that workers hold are not among them."""
        return int(self._call("llen", queue))

    def images_with_message(self, queues: Iterable[str]) -> set[str]:
        """Ids of the images that have a message on one of `queues` or in a worker's hands."""
        messages = [text for queue in queues for text in self._messages(queue)]
        messages += self._call("hvals", _UNACKED)  # behind them: this is where they go
        return {found.group(1) for text in messages if (found := _CORRELATION.search(text))}

    def _messages(self, queue: str) -> Iterator[str]:
        """In steps that hold nobody up, from the end at which messages come in: what moves meanwhile moves on."""
        for first in itertools.count(0, MESSAGES_AT_ONCE):
            found = self._call("lrange", queue, first, first + MESSAGES_AT_ONCE - 1)
            yield from found
            if len(found) < MESSAGES_AT_ONCE:
                return

    def survey(self, queues: Sequence[str]) -> Survey:
        """In constant time for each queue, whatever its length."""
        waiting, leased, retry, *rows = self._move("survey", *queues)
        sizes = zip(rows[::2], (float(age) for age in rows[1::2]), strict=True)
        return Survey(waiting, leased, retry, dict(zip(queues, sizes, strict=True)))

    def info(self) -> dict[str, Any]:
        """What the server says of itself (INFO), its sections in one."""
        return dict(self._call("info"))

    def uptime_s(self) -> int:
        """How long the server has been up: after a restart, leases could not be renewed for a while."""
        return int(self.info()["uptime_in_seconds"])

    def time_s(self) -> float:
        """The server's clock, by which everything here is counted."""
        seconds, micros = self._call("time")
        return float(seconds) + float(micros) / 1e6

    def is_dispatched(self) -> bool:
        """Whether a dispatcher is active."""
        return bool(self._call("exists", "cf:dispatcher"))

    def ping(self) -> None:
        self._call("ping")

    def _find_jobs(self, names: Sequence[str]) -> Iterator[Job]:
        """In one round trip; without those that are forgotten."""
        with self._redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.hgetall(f"cf:job:{name}")
            found = self._guard(pipe.execute)
        yield from (job_from_fields(name, fields) for name, fields in zip(names, found, strict=True) if fields)

    def _unknown(self, job: str) -> JobError:
        return JobError(
            f"There is no job {job!r} on {self.name}. `cutfleet jobs` lists them; a closed job is kept for "
            "CUTFLEET_KEEP_DAYS, its report in S3 for ever."
        )

    def _move(self, move: str, *args: str | int | float | bytes) -> Any:
        return self._guard(lambda: self._scripts[move](args=(move, *args)))

    def _call(self, command: str, *args: Any, **options: Any) -> Any:
        return self._guard(lambda: getattr(self._redis, command)(*args, **options))

    def _guard(self, call: Callable[[], Any]) -> Any:
        error: CutfleetError | None = None
        try:
            return call()
        except RedisError as exc:
            error = map_redis_error(exc, self.name)
            raise error from exc
        finally:
            self.heard(error)


@functools.cache
def _read_scripts() -> dict[str, str]:
    """By move, as the head of `ledger.lua` says."""
    text = importlib.resources.files("jobs.ledger").joinpath("ledger.lua").read_text()
    head, *moves = re.split(r"(?m)^(?=function (?:move|fenced)\.)", text)
    named = {text[text.index(".") + 1 : text.index("(")]: text for text in moves}
    return {
        move: f"{_ALLOW_OOM if move in _NEVER_REFUSED else ''}{head}{text}\nreturn run()"
        for move, text in named.items()
    }


def _flat(pairs: Mapping[str, str | int | float]) -> list[str | int | float]:
    return [value for pair in pairs.items() for value in pair]


def _pairs(flat: Sequence[str]) -> dict[str, str]:
    return dict(zip(flat[::2], flat[1::2], strict=True))
