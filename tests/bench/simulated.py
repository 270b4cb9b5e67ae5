"""Stand-ins for what a simulation of the queue leaves out: a store whose source is generated keys and whose records lie
in a folder, and consumers whose work takes no time. Ledger, messages and dispatcher are the product's own."""

from __future__ import annotations

import collections
import random
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import redis

from jobs.broker import task_of, worker_queues
from jobs.job import ImageState
from jobs.ledger import Claim, Ledger
from jobs.s3.client import PAGE_KEYS, Location, Role, S3Object, Store, image_names

MODEL = "bench"
SOURCE, DESTINATION = "s3://in/photos/", "s3://out/"


class FolderStore(Store):
    """`count` keys as one would list them; everything that is put stays in `folder`."""

    def __init__(self, folder: Path, count: int) -> None:
        self.name = "a folder"
        self._folder = folder
        self._count = count

    @property
    def is_one(self) -> bool:
        return True

    def head(self, location: Location, *, role: Role) -> S3Object | None:
        path = self._folder / location.key
        return S3Object(location.key, "etag", path.stat().st_size) if path.exists() else None

    def list_pages(
        self, prefix: Location, *, role: Role, delimiter: str = "", after: str = ""
    ) -> Iterator[tuple[list[S3Object], list[str]]]:
        """A thousand keys a folder, a page; nothing in other buckets."""
        if prefix.bucket != Location.parse(SOURCE).bucket:
            return
        below = prefix.key.removeprefix(Location.parse(SOURCE).key)
        folders = [int(below.rstrip("/"))] if below else range(-(-self._count // PAGE_KEYS))
        if delimiter:
            names = [f"{prefix.key}{folder:06d}/" for folder in folders]
            yield from (([], names[first : first + PAGE_KEYS]) for first in range(0, len(names), PAGE_KEYS))
            return
        for folder in folders:
            indexes = range(folder * PAGE_KEYS, min(self._count, (folder + 1) * PAGE_KEYS))
            keys = (f"{Location.parse(SOURCE).key}{folder:06d}/{index:08d}.jpg" for index in indexes)
            yield [S3Object(key, key[-12:-4].zfill(32), 500_000) for key in keys], []

    def put(self, location: Location, body: bytes, **_: Any) -> str:
        path = self._folder / location.key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
        return "etag"

    def get(self, location: Location, *, role: Role, etag: str = "", max_bytes: int) -> tuple[bytes, str]:
        return (self._folder / location.key).read_bytes(), "etag"

    def honours_conditions(self, location: Location, body: bytes) -> bool:
        self.put(location, body)
        return True

    def close(self) -> None:
        pass


class _Together(Ledger):
    """Gathers moves; `send` has them done in one round trip, as those of a worker's threads overlap."""

    def __init__(self, url: str) -> None:
        super().__init__(url, name="the simulation")
        self._gathered: list[tuple[str | int | float, ...]] = []
        self.ping()
        for script in self._scripts.values():
            self._redis.script_load(script.script)

    def _move(self, move: str, *args: str | int | float) -> Any:
        self._gathered.append((move, *args))
        return ["gathered"]

    def send(self) -> list[Any]:
        with self._redis.pipeline(transaction=False) as pipe:
            for args in self._gathered:
                pipe.evalsha(self._scripts[str(args[0])].sha, 0, *args)
            self._gathered.clear()
            return list(pipe.execute())


class Consumer:
    """Takes messages as kombu does, claims and commits. A share of the messages is delivered twice."""

    def __init__(self, url: str, *, duplicates: float = 0.0, seed: int = 0) -> None:
        self.verdicts: collections.Counter[str] = collections.Counter()
        self.injected = 0
        self._ledger = _Together(url)
        self._redis: redis.Redis = redis.Redis.from_url(url, decode_responses=True)
        self._duplicates = duplicates
        self._random = random.Random(seed)

    def take(self, count: int) -> list[Claim]:
        """Up to `count` images that are ours now."""
        claims = []
        for text in (text for queue in worker_queues(MODEL) for text in self._pop(queue, count)):
            task, token = task_of(text), uuid.uuid4().hex
            output = str(image_names(SOURCE, DESTINATION, task.key).cutout)
            self._ledger.claim(task.id, token=token, output=output, lease_s=60)
            claims.append(Claim("go", task.id, token))
        answers = self._ledger.send()
        self.verdicts.update(answer[0] for answer in answers)
        return [claim for claim, answer in zip(claims, answers, strict=True) if answer[0] == "go"]

    def finish(self, claims: list[Claim]) -> None:
        for claim in claims:
            self._ledger.finish(claim, ImageState.DONE)
        self.verdicts.update(f"finish {answer}" for answer in self._ledger.send())

    def close(self) -> None:
        self._ledger.close()
        self._redis.close()

    def _pop(self, queue: str, count: int) -> list[str]:
        """The second delivery of a message comes at once or after its image is done, by chance."""
        messages: list[str] = self._redis.rpop(queue, count) or []  # type: ignore[assignment]  # the answer types cover asyncio too
        twice = [text for text in messages if self._random.random() < self._duplicates]
        if twice:
            self.injected += len(twice)
            self._redis.lpush(queue, *twice)
        return messages


def say_alive(ledger: Ledger, *, node: str, slots: int, more: Mapping[str, str | int] | None = None) -> None:
    ledger.heartbeat(node, {"model": MODEL, "slots": slots, **(more or {})}, ttl_s=3600)
