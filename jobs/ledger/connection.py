"""Where Redis is, in one URL for the ledger and for Celery, and what it raises, as ours.

redis://USER:PASSWORD@HOST:6379/0     rediss:// for TLS
sentinel://USER:PASSWORD@HOST:26379/0?master_name=NAME;sentinel://OTHER:26379;...
    whoever the Sentinels call NAME's primary; user, password and database are the servers', Sentinels ask for none
"""

from __future__ import annotations

import dataclasses
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

from jobs.errors import CutfleetError, ServiceUnavailable

SENTINEL_PORT = 26379


class Fenced(CutfleetError):
    """Another dispatcher is active: this one must not change anything."""

    code = "fenced"


@dataclasses.dataclass(frozen=True)
class Sentinels:
    """`hosts`: host and port of each. `database`: the number, as text."""

    hosts: tuple[tuple[str, int], ...]
    master_name: str
    username: str | None = dataclasses.field(repr=False)
    password: str | None = dataclasses.field(repr=False)
    database: str


def sentinels_of(url: str) -> Sentinels | None:
    """None for the URL of a server. Raises `ValueError`."""
    if not url.startswith("sentinel://"):
        return None
    parts = [urlsplit(one) for one in url.split(";") if one]
    first = parts[0]
    names = parse_qs(first.query).get("master_name", [""])
    if any(part.scheme != "sentinel" or not part.hostname for part in parts) or not names[0]:
        raise ValueError(
            "must be sentinel://HOST:26379/0?master_name=NAME;sentinel://OTHER:26379, as many Sentinels as there are"
        )
    return Sentinels(
        tuple((str(part.hostname), part.port or SENTINEL_PORT) for part in parts),
        names[0],
        unquote(first.username) if first.username else None,
        unquote(first.password) if first.password else None,
        first.path.strip("/") or "0",
    )


def connect(url: str) -> redis.Redis:
    """A client with deadlines; nothing is asked yet. A connection that breaks is made anew, with Sentinels to whoever
    is the primary then."""
    options: dict[str, Any] = {
        "decode_responses": True,
        "socket_timeout": 10,
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        "health_check_interval": 15,
        "retry": Retry(ExponentialWithJitterBackoff(cap=1, base=0.05), 3),
    }
    found = sentinels_of(url)
    if found is None:
        return redis.Redis.from_url(url, **options)
    patience = {"socket_timeout": 2, "socket_connect_timeout": 2}
    asked = Sentinel(list(found.hosts), sentinel_kwargs=patience)  # type: ignore[no-untyped-call]
    user = {"username": found.username, "password": found.password, "db": int(found.database)}
    client: redis.Redis = asked.master_for(found.master_name, **options, **user)  # type: ignore[no-untyped-call]
    return client


def broker_urls(url: str) -> tuple[str, dict[str, str]]:
    """As Celery takes it, with the transport options that it needs."""
    found = sentinels_of(url)
    if found is None:
        return url, {}
    user = urlsplit(url.split(";")[0]).netloc.rpartition("@")[0]
    before = f"{user}@" if user else ""
    urls = [f"sentinel://{before}{host}:{port}/{found.database}" for host, port in found.hosts]
    return ";".join(urls), {"master_name": found.master_name}


def map_redis_error(exc: RedisError, name: str) -> CutfleetError:
    """What redis-py raised, as ours. `name`: the server, without a password."""
    text = str(exc)
    if text.startswith("FENCED"):
        return Fenced("Another dispatcher is active; this one stands by.")
    if isinstance(
        exc, (AuthenticationError, AuthenticationWrongNumberOfArgsError, AuthorizationError, NoPermissionError)
    ):
        return ServiceUnavailable(
            f"Redis at {name} refuses us: {text}. Check user, password and rights in CUTFLEET_REDIS_URL.",
            code="redis_denied",
        )
    if isinstance(exc, OutOfMemoryError) or "OOM command not allowed" in text:
        return ServiceUnavailable(
            f"Redis at {name} is full: raise its maxmemory, or let the workers drain the queues.", code="redis_full"
        )
    if text.startswith("MISCONF"):
        return ServiceUnavailable(
            f"Redis at {name} can't write to its disk, and takes no writes until it can: free its disk.",
            code="redis_cannot_save",
        )
    if isinstance(exc, (RedisConnectionError, RedisTimeoutError, ReadOnlyError)):
        return ServiceUnavailable(
            f"Redis at {name} can't be reached: {text.rstrip('.')}. Is it running? Check CUTFLEET_REDIS_URL.",
            code="redis_unreachable",
        )
    return ServiceUnavailable(f"Redis at {name} failed: {text}", code="redis_failed")
