"""Checks of the Redis or Valkey server: version, mode, memory, persistence, latency, clock."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jobs.ledger import Ledger
from producer.doctor.findings import REMEDIES, Finding, error, ok, timed_ms, warning

PINGS = 20
SLOW_MS = 10.0
"""An image costs some ten round trips."""
OLDEST_VERSION = (7, 2)
CLOCK_S = 5.0
FULL, NEARLY_FULL = 0.95, 0.8

Info = Mapping[str, Any]
"""Redis's INFO."""


def check_redis(ledger: Ledger, now: Callable[[], float]) -> Iterator[Finding]:
    """`now`: this machine's clock as Unix time."""
    info = ledger.server_info()
    yield from _check_latency(ledger, info)
    yield from _check_version(info["redis_version"])
    yield from _check_mode(info)
    yield from _check_memory(info)
    yield from _check_persistence(info)
    ahead_s = ledger.server_time_s() - now()
    if abs(ahead_s) > CLOCK_S:
        yield warning(
            "redis",
            "clock_differs",
            f"Its clock is {ahead_s:+.0f} s from this machine's.",
            "Run NTP on both: S3 refuses a clock that is 15 minutes wrong, and logs can't be ordered by time.",
        )


def _check_latency(ledger: Ledger, info: Info) -> Iterator[Finding]:
    times_ms = [timed_ms(ledger.server_time_s) for _ in range(PINGS)]  # not PING, which fails while it can't save
    median_ms = statistics.median(times_ms)
    name, version = ("Valkey", "valkey_version") if "valkey_version" in info else ("Redis", "redis_version")
    yield ok("redis", f"{name} {info[version]}, answers in {median_ms:.1f} ms.")
    if median_ms > SLOW_MS:
        yield warning(
            "redis",
            "redis_slow",
            f"Half of its answers take over {median_ms:.0f} ms.",
            "Move Redis nearer to the workers: an image costs some ten round trips.",
        )


def _check_version(version: str) -> Iterator[Finding]:
    """`version`: of Redis; Valkey reports 7.2.4, the version that it is compatible with."""
    if tuple(map(int, version.split(".")[:2])) < OLDEST_VERSION:
        yield warning(
            "redis",
            "redis_old",
            f"Redis {version} is older than {'.'.join(map(str, OLDEST_VERSION))}, and out of support.",
            "Move to Valkey 8 or later, or to Redis 7.2 or later; either reads its append-only file.",
        )


def _check_mode(info: Info) -> Iterator[Finding]:
    if info["cluster_enabled"]:
        yield error(
            "redis",
            "redis_cluster",
            "It runs in cluster mode, where our scripts can't reach all of their keys.",
            "Use one primary, with replicas if needed: cluster-enabled no.",
        )
    if info["role"] != "master":
        yield error(
            "redis",
            "redis_replica",
            f"It is a replica of {info.get('master_host')}: it refuses writes.",
            "Point CUTFLEET_REDIS_URL at the primary.",
        )


def _check_memory(info: Info) -> Iterator[Finding]:
    limit, limit_name = info["maxmemory"], "maxmemory"
    if not limit:
        limit, limit_name = info["total_system_memory"], "the machine's memory"
    share = info["used_memory"] / limit
    text = f"It uses {info['used_memory'] / 1e6:.0f} MB, {share:.0%} of {limit_name}."
    if share >= FULL:
        yield error("redis", "redis_full", text, REMEDIES["redis_full"])
    elif share >= NEARLY_FULL:
        yield warning("redis", "redis_nearly_full", text, REMEDIES["redis_full"])
    else:
        yield ok("redis", text)
    if info["maxmemory_policy"] != "noeviction":
        yield error(
            "redis",
            "redis_evicts",
            f"It drops keys when it is full: maxmemory-policy {info['maxmemory_policy']}.",
            "Set maxmemory-policy noeviction: a dropped key is a lost job or image.",
        )


def _check_persistence(info: Info) -> Iterator[Finding]:
    failed = [name for name in ("aof_last_write_status", "rdb_last_bgsave_status") if info.get(name, "ok") != "ok"]
    if failed:
        yield error(
            "redis",
            "redis_cannot_save",
            f"It can't write to its disk ({', '.join(failed)}).",
            REMEDIES["redis_cannot_save"],
        )
    if info["aof_enabled"]:
        yield ok("redis", "It appends every change to its file.")
    else:
        yield warning(
            "redis",
            "redis_forgets",
            "It appends nothing to disk (appendonly no): a restart loses open jobs.",
            "Set appendonly yes, or run replicas that take over. `cutfleet audit` rebuilds lost jobs from S3.",
        )
