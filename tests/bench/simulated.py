"""Stand-ins for a simulation of the queue: a store with generated keys and records in a folder, and consumers whose
work takes no time. Ledger, messages and dispatcher are real."""

from __future__ import annotations

import collections
import random
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import redis

from jobs.envelope import parse_message
from jobs.job import ImageState
from jobs.ledger import Ledger
from jobs.ledger.connection import read_scripts
from jobs.ledger.window import Claim, ClaimOutcome, Recorded, Window
from jobs.message import worker_queues
from jobs.s3.client import PAGE_KEYS, S3Object, Store
from jobs.s3.errors import Role
from jobs.s3.location import Location
from jobs.s3.names import image_paths

MODEL = "bench"
SOURCE, DESTINATION = Location("in", "photos/"), Location("out", "")


class FolderStore(Store):
    """Lists `count` generated keys; keeps objects in `folder`."""

    def __init__(self, folder: Path, count: int) -> None:
        self.name = "a folder"
        self._folder = folder
        self._count = count

    @property
    def has_one_account(self) -> bool:
        return True

    def check_allowed(self, location: Location, role: Role) -> None:
        """Everything is allowed."""

    def head(self, location: Location, *, role: Role) -> S3Object | None:
        path = self._folder / location.key
        return S3Object(location.key, "etag", path.stat().st_size) if path.exists() else None

    def list_pages(
        self, prefix: Location, *, role: Role, delimiter: str = "", after: str = ""
    ) -> Iterator[tuple[list[S3Object], list[str]]]:
        """Yield a page for each folder of a thousand keys; none for other buckets."""
        if prefix.bucket != SOURCE.bucket:
            return
        below = prefix.key.removeprefix(SOURCE.key)
        folders = [int(below.rstrip("/"))] if below else range(-(-self._count // PAGE_KEYS))
        if delimiter:
            names = [f"{prefix.key}{folder:06d}/" for folder in folders]
            yield from (([], names[first : first + PAGE_KEYS]) for first in range(0, len(names), PAGE_KEYS))
            return
        for folder in folders:
            indexes = range(folder * PAGE_KEYS, min(self._count, (folder + 1) * PAGE_KEYS))
            keys = (f"{SOURCE.key}{folder:06d}/{index:08d}.jpg" for index in indexes)
            yield [S3Object(key, key[-12:-4].zfill(32), 500_000) for key in keys], []

    def put(self, location: Location, body: bytes, **_: Any) -> str:
        path = self._folder / location.key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
        return "etag"

    def get(self, location: Location, *, role: Role, etag: str = "", max_bytes: int) -> tuple[bytes, str]:
        return (self._folder / location.key).read_bytes(), "etag"

    def supports_conditional_writes(self, location: Location, body: bytes) -> bool:
        self.put(location, body)
        return True

    def close(self) -> None:
        pass


class PipelinedConnection:
    """In place of the ledger's `Connection`: collects the scripts of claims and commits, and `send` runs them in one
    round trip, as concurrent threads of a worker do. Until then each claim succeeds."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._scripts = {name: client.register_script(text) for name, text in read_scripts().items()}
        for script in self._scripts.values():
            client.script_load(script.script)
        self._calls: list[tuple[str, ...]] = []

    def run(self, script: str, *args: str | int | float | bytes) -> Any:
        self._calls.append((script, *map(str, args)))
        return [ClaimOutcome.GO] if script == "claim" else Recorded.OK

    def send(self) -> list[Any]:
        """Return the answers in the order of the calls."""
        with self._client.pipeline(transaction=False) as pipe:
            for call in self._calls:
                pipe.evalsha(self._scripts[call[0]].sha, 0, *call)
            self._calls.clear()
            return list(pipe.execute())


class Consumer:
    """Takes messages as kombu does, claims and commits. `duplicates`: share of messages that are delivered twice.
    `outcomes`: number of claims by outcome, and of commits by `finish` and answer. `injected`: second deliveries."""

    def __init__(self, url: str, *, duplicates: float = 0.0, seed: int = 0) -> None:
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.injected = 0
        self._client = redis.Redis.from_url(url, decode_responses=True)
        self._connection = PipelinedConnection(self._client)
        self._window = Window(self._connection)  # type: ignore[arg-type]  # all that claiming and committing needs
        self._duplicates = duplicates
        self._random = random.Random(seed)

    def take(self, count: int) -> list[Claim]:
        """Claim up to `count` images; return the successful claims."""
        claims = []
        for text in (text for queue in worker_queues(MODEL) for text in self._pop(queue, count)):
            task, token = parse_message(text), uuid.uuid4().hex
            output = str(image_paths(SOURCE, DESTINATION, task.key).cutout)
            claims.append(self._window.claim(task.id, token=token, output=output, lease_s=60))
        outcomes = [ClaimOutcome(answer[0]) for answer in self._connection.send()]
        self.outcomes.update(outcomes)
        return [claim for claim, outcome in zip(claims, outcomes, strict=True) if outcome is ClaimOutcome.GO]

    def finish(self, claims: list[Claim]) -> None:
        for claim in claims:
            self._window.finish(claim, ImageState.DONE)
        self.outcomes.update(f"finish {answer}" for answer in self._connection.send())

    def close(self) -> None:
        self._client.close()

    def _pop(self, queue: str, count: int) -> list[str]:
        """Take messages. The second delivery of one comes at once or after its image is done."""
        messages: list[str] = self._client.rpop(queue, count) or []  # type: ignore[assignment]  # the types cover asyncio too
        second = [text for text in messages if self._random.random() < self._duplicates]
        if second:
            self.injected += len(second)
            self._client.lpush(queue, *second)
        return messages


def send_heartbeat(ledger: Ledger, *, node: str, slots: int, more: Mapping[str, str | int] | None = None) -> None:
    ledger.fleet.heartbeat(node, {"model": MODEL, "slots": slots, **(more or {})}, ttl_s=3600)
