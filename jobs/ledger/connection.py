"""Connection to Redis: its URL, for the ledger and for Celery; scripts and commands; its errors as ours.

redis://USER:PASSWORD@HOST:6379/0     rediss:// for TLS
sentinel://USER:PASSWORD@HOST:26379/0?master_name=NAME;sentinel://OTHER:26379;...
    the primary that the Sentinels report for NAME; user, password and database are the servers', not the Sentinels'
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    AuthorizationError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry
from redis.sentinel import Sentinel

from jobs.errors import CutfleetError, RedisFull, RedisUnavailable

SENTINEL_PORT = 26379
MAX_ROWS = 500
"""Most rows of one script call: far below Lua's limit of arguments."""
_ALLOW_OOM = "#!lua flags=allow-oom\n"
_RUN_WHEN_FULL = {
    *(
        "claim",
        "renew",
        "finish",
        "defer",
        "release",
        "vanish",
        "computing",
        "heartbeat",
        "delivered",
        "outcome",
        "lead",
    ),
    *("still", "hold", "resign", "close", "cancel", "cancel_fed", "cancel_rest", "spilled", "record", "listed"),
    *("pause", "unpause"),
}
"""Scripts that run even when Redis is full: they free memory, or need little to finish what is in work, so that workers
and dispatcher make room again."""


class Fenced(CutfleetError):
    """Another dispatcher is active: this one must not change anything."""

    code = "fenced"


class Connection:
    """One connection pool; safe for threads. Every method raises `RedisUnavailable` when Redis fails."""

    def __init__(self, url: str, *, name: str) -> None:
        """`name`: the server in messages (the URL without its password)."""
        self.name = name
        self.on_answer: Callable[[CutfleetError | None], None] = lambda _: None
        self._redis = connect(url)
        self._scripts = {script: self._redis.register_script(text) for script, text in read_scripts().items()}

    def close(self) -> None:
        self._redis.close()

    def run(self, script: str, *args: str | int | float | bytes) -> Any:
        """Run one of the ledger's scripts."""
        return self._guard(lambda: self._scripts[script](args=(script, *args)))

    def call(self, command: str, *args: Any, **options: Any) -> Any:
        """Run a command by the name of its redis-py method."""
        return self._guard(lambda: getattr(self._redis, command)(*args, **options))

    def get_hashes(self, keys: Sequence[str]) -> list[dict[str, str]]:
        """Return the hash at each key, empty where there is none, in one round trip."""
        with self._redis.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.hgetall(key)
            return list(self._guard(pipe.execute))

    def get_range(self, key: str, first: int, end: int) -> bytes:
        """Return bytes [first, end) of a string, padded with zeros."""
        found: bytes = self.call("execute_command", "GETRANGE", key, first, end - 1, NEVER_DECODE=True)
        return found.ljust(end - first, b"\0")

    def scan_hash(self, key: str) -> Iterator[tuple[str, str]]:
        """Yield the fields of a hash in no order; a field may come twice."""
        cursor = 0
        while True:
            cursor, fields = self.call("hscan", key, cursor, count=1000)
            yield from fields.items()
            if not cursor:
                return

    def _guard(self, call: Callable[[], Any]) -> Any:
        error: CutfleetError | None = None
        try:
            return call()
        except RedisError as exc:
            error = map_redis_error(exc, self.name)
            raise error from exc
        finally:
            self.on_answer(error)


def flatten(pairs: Mapping[str, str | int | float]) -> list[str | int | float]:
    """Return name, value, name, value ..., as a script takes pairs."""
    return [value for pair in pairs.items() for value in pair]


def to_pairs(flat: Sequence[str]) -> dict[str, str]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


@functools.cache
def read_scripts() -> dict[str, str]:
    """Split `ledger.lua` into one script for each of its functions, as its head says."""
    text = importlib.resources.files("jobs.ledger").joinpath("ledger.lua").read_text()
    head, *functions = re.split(r"(?m)^(?=function (?:script|fenced)\.)", text)
    by_name = {text[text.index(".") + 1 : text.index("(")]: text for text in functions}
    return {
        name: f"{_ALLOW_OOM if name in _RUN_WHEN_FULL else ''}{head}{text}\nreturn run()"
        for name, text in by_name.items()
    }


@dataclasses.dataclass(frozen=True)
class Sentinels:
    """`hosts`: host and port of each. `database`: the number, as text."""

    hosts: tuple[tuple[str, int], ...]
    master_name: str
    username: str | None = dataclasses.field(repr=False)
    password: str | None = dataclasses.field(repr=False)
    database: str


def parse_sentinels(url: str) -> Sentinels | None:
    """Return None for the URL of a server. Raises `ValueError` for a malformed URL of Sentinels."""
    if not url.startswith("sentinel://"):
        return None
    parts = [urlsplit(one) for one in url.split(";") if one]
    first = parts[0]
    names = parse_qs(first.query).get("master_name", [""])
    if any(part.scheme != "sentinel" or not part.hostname for part in parts) or not names[0]:
        raise ValueError(
            "must be sentinel://HOST:26379/0?master_name=NAME;sentinel://OTHER:26379, naming all Sentinels"
        )
    return Sentinels(
        tuple((str(part.hostname), part.port or SENTINEL_PORT) for part in parts),
        names[0],
        unquote(first.username) if first.username else None,
        unquote(first.password) if first.password else None,
        first.path.strip("/") or "0",
    )


def connect(url: str) -> redis.Redis:
    """Return a client with deadlines; connects at the first command. Reconnects by itself, with Sentinels to the
    current primary."""
    options: dict[str, Any] = {
        "decode_responses": True,
        "socket_timeout": 10,
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        "health_check_interval": 15,
        "retry": Retry(ExponentialWithJitterBackoff(cap=1, base=0.05), 3),
    }
    found = parse_sentinels(url)
    if found is None:
        return redis.Redis.from_url(url, **options)
    timeouts = {"socket_timeout": 2, "socket_connect_timeout": 2}
    sentinel = Sentinel(list(found.hosts), sentinel_kwargs=timeouts)  # type: ignore[no-untyped-call]
    user = {"username": found.username, "password": found.password, "db": int(found.database)}
    client: redis.Redis = sentinel.master_for(found.master_name, **options, **user)  # type: ignore[no-untyped-call]
    return client


def broker_urls(url: str) -> tuple[str, dict[str, str]]:
    """Return the URL in Celery's form, and the transport options that it needs."""
    found = parse_sentinels(url)
    if found is None:
        return url, {}
    user = urlsplit(url.split(";")[0]).netloc.rpartition("@")[0]
    login = f"{user}@" if user else ""
    urls = [f"sentinel://{login}{host}:{port}/{found.database}" for host, port in found.hosts]
    return ";".join(urls), {"master_name": found.master_name}


def map_redis_error(exc: RedisError, name: str) -> CutfleetError:
    """Return our error for `exc`. `name`: the server, without its password."""
    text = str(exc)
    if text.startswith("FENCED"):
        return Fenced("Another dispatcher is active; this one is on standby.")
    if isinstance(
        exc, (AuthenticationError, AuthenticationWrongNumberOfArgsError, AuthorizationError, NoPermissionError)
    ):
        return RedisUnavailable(
            f"Redis at {name} refuses access: {text}. Check user, password and rights in CUTFLEET_REDIS_URL.",
            code="redis_denied",
        )
    if isinstance(exc, OutOfMemoryError) or "OOM command not allowed" in text:
        return RedisFull(f"Redis at {name} is full: raise its maxmemory, or let the workers drain the queues.")
    if text.startswith("MISCONF"):
        return RedisUnavailable(
            f"Redis at {name} can't write to its disk and refuses writes: free space on its disk.",
            code="redis_cannot_save",
        )
    if isinstance(exc, (RedisConnectionError, RedisTimeoutError, ReadOnlyError)):
        return RedisUnavailable(
            f"Redis at {name} can't be reached: {text.rstrip('.')}. Is it running? Check CUTFLEET_REDIS_URL.",
            code="redis_unreachable",
        )
    return RedisUnavailable(f"Redis at {name} failed: {text}", code="redis_failed")
