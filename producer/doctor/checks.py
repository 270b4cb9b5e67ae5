"""`cutfleet doctor`: looks at everything a fleet stands on and says for each finding what to do. It changes nothing but
one small object that it writes: `TO/_cutfleet/doctor/probe.json`.
"""

from __future__ import annotations

import collections
import importlib.metadata
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jobs.broker import lane_queue, worker_queues
from jobs.catalogue import PRESETS, RENDER
from jobs.errors import CutfleetError
from jobs.job import Job
from jobs.ledger import Ledger
from jobs.recipe import Recipe
from jobs.s3.client import Location, S3Object, Store, destination_prefix, record_location
from jobs.settings import load_settings
from producer.console.fleet import count_served
from producer.doctor.findings import REMEDIES, Finding, caught, error, failed, ok, timed_ms, tried, warning
from producer.submission.submit import check_places

PINGS = 20
SLOW_REDIS_MS = 10.0  # an image costs some ten round trips
OLDEST_REDIS = (7, 2)
CLOCK_S = 5.0
FULL, NEARLY_FULL = 0.95, 0.8
MIN_FREE_GB = 1.0  # a manifest of ten million keys is sorted in about this
STUCK_S = 120.0
"""A worker with images before its device makes progress far more often, even on a loaded CPU."""
LIVE_WAITS_S = 60.0
CPU_MODEL_M = 10.0
"""Millions of weights; what is larger takes many seconds an image on a CPU."""


def examine(
    *, source: str | None = None, destination: str | None = None, now: Callable[[], float] = time.time
) -> Iterator[Finding]:
    """Everything there is to say, as it is found. `source`, `destination`: s3:// prefixes to try; None: those of the
    newest open job."""
    try:
        settings = load_settings()
    except CutfleetError as exc:
        yield failed("settings", exc)
        return
    yield ok("settings", f"Redis at {settings.redis_name}, S3 at {settings.s3_name}, model {settings.model}.")
    yield ok(
        "settings", f"Allowed sources: {_places(settings.sources)}; destinations: {_places(settings.destinations)}."
    )
    yield from _disk()
    jobs: list[Job] = []
    with Ledger(settings.redis_url, name=settings.redis_name) as ledger:
        yield from caught("redis", lambda: _redis(ledger, now))
        fleet = list(caught("workers", lambda: _fleet(ledger, jobs)))
    with Store.of(settings, connections=4) as store:
        yield from _s3(store, source or _newest(jobs, "source"), destination or _newest(jobs, "destination"))
    yield from (found for found in fleet if found.code not in REMEDIES)  # Redis itself was told of above


def _places(allowed: str) -> str:
    return allowed or "any"


def _disk() -> Iterator[Finding]:
    folder = tempfile.gettempdir()
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < MIN_FREE_GB:
        yield warning(
            "disk",
            "disk_full",
            f"{folder} has {free_gb:.1f} GB free; manifests are sorted there.",
            "Free some space, or set TMPDIR.",
        )
    else:
        yield ok("disk", f"{folder} has {free_gb:.0f} GB free.")


def _redis(ledger: Ledger, now: Callable[[], float]) -> Iterator[Finding]:
    info = ledger.info()
    pings = [timed_ms(ledger.time_s) for _ in range(PINGS)]  # a PING it refuses when it can't save
    name, version = ("Valkey", "valkey_version") if "valkey_version" in info else ("Redis", "redis_version")
    yield ok("redis", f"{name} {info[version]}, answers in {statistics.median(pings):.1f} ms.")
    if statistics.median(pings) > SLOW_REDIS_MS:
        yield warning(
            "redis",
            "redis_slow",
            f"Half of its answers take over {statistics.median(pings):.0f} ms.",
            "Move Redis nearer to the workers: an image costs some ten round trips.",
        )
    yield from _redis_version(info["redis_version"])
    yield from _redis_kind(info)
    yield from _redis_memory(info)
    yield from _redis_persistence(info)
    ahead_s = ledger.time_s() - now()
    if abs(ahead_s) > CLOCK_S:
        yield warning(
            "redis",
            "clock_differs",
            f"Its clock is {ahead_s:+.0f} s from this machine's.",
            "Run NTP on both: S3 refuses a clock that is 15 minutes wrong, and logs can't be put in order.",
        )


def _redis_version(version: str) -> Iterator[Finding]:
    """Valkey says there which Redis it is like: 7.2.4, since its first version."""
    if tuple(map(int, version.split(".")[:2])) < OLDEST_REDIS:
        yield warning(
            "redis",
            "redis_old",
            f"Redis {version} is older than {'.'.join(map(str, OLDEST_REDIS))}, and out of support.",
            "Move to Valkey 8 or later, or to Redis 7.2 or later: append-only file or replica go with it.",
        )


def _redis_kind(info: Mapping[str, Any]) -> Iterator[Finding]:
    if info["cluster_enabled"]:
        yield error(
            "redis",
            "redis_cluster",
            "It runs in cluster mode, where our scripts can't reach their keys.",
            "Use one primary (with replicas, if you like): cluster-enabled no.",
        )
    if info["role"] != "master":
        yield error(
            "redis",
            "redis_replica",
            f"It is a replica of {info.get('master_host')}: it takes no writes.",
            "Point CUTFLEET_REDIS_URL at the primary.",
        )


def _redis_memory(info: Mapping[str, Any]) -> Iterator[Finding]:
    limit = info["maxmemory"] or info["total_system_memory"]
    share, what = info["used_memory"] / limit, "maxmemory" if info["maxmemory"] else "the machine's memory"
    text = f"It uses {info['used_memory'] / 1e6:.0f} MB, {share:.0%} of {what}."
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
            f"When it is full it drops keys: maxmemory-policy {info['maxmemory_policy']}.",
            "Set maxmemory-policy noeviction: a key that is dropped is a job or an image that is lost.",
        )


def _redis_persistence(info: Mapping[str, Any]) -> Iterator[Finding]:
    broken = [name for name in ("aof_last_write_status", "rdb_last_bgsave_status") if info.get(name, "ok") != "ok"]
    if broken:
        yield error(
            "redis",
            "redis_cannot_save",
            f"It can't write to its disk ({', '.join(broken)}).",
            REMEDIES["redis_cannot_save"],
        )
    if info["aof_enabled"]:
        yield ok("redis", "It appends every change to its file.")
    else:
        yield warning(
            "redis",
            "redis_forgets",
            "It appends nothing to disk (appendonly no): a restart forgets open jobs.",
            "Set appendonly yes, or run replicas that take over. What S3 holds is safe either way.",
        )


def _s3(store: Store, source: str | None, destination: str | None) -> Iterator[Finding]:
    for name, value in (("--source", source), ("--to", destination)):
        if value is None:
            yield warning(
                "s3",
                "not_tried",
                f"No job is open, so nothing was tried there for {name}.",
                f"Say {name} s3://BUCKET/PREFIX.",
            )
    if source is not None and destination is not None:
        yield from caught("s3", lambda: check_places(source, destination, recipe=Recipe(), store=store))
    if source is not None:
        yield from _source(store, source)
    if destination is not None:
        yield from _destination(store, destination)


def _source(store: Store, source: str) -> Iterator[Finding]:
    prefix = Location.parse(source)
    found: list[S3Object | None] = []
    yield from tried("s3", f"lists {prefix}", lambda: found.append(next(store.list_source(prefix), None)))
    match found:
        case [None]:
            yield warning(
                "s3",
                "source_empty",
                f"There are no images under {prefix}, so nothing could be read.",
                "Correct the prefix: it matches as S3 does, from the first letter on.",
            )
        case [S3Object(key=key)]:
            place = Location(prefix.bucket, key)
            yield from tried("s3", f"reads {place}", lambda: store.head(place, role="source"))


def _destination(store: Store, destination: str) -> Iterator[Finding]:
    probe = record_location(destination, "doctor", "probe.json")
    missing = Location(probe.bucket, f"{destination_prefix(destination).key}cutouts/_cutfleet-doctor-missing.png")
    honoured: list[bool] = []
    yield from tried("s3", f"sees that {missing} is not there", lambda: store.head(missing, role="output"))
    yield from tried("s3", f"writes {probe}", lambda: honoured.append(store.honours_conditions(probe, b"{}")))
    if honoured == [False]:
        yield warning(
            "s3",
            "conditions_ignored",
            "The store ignores If-None-Match or If-Match: a worker that wakes late can overwrite.",
            "Use a store that knows conditional writes, or give every job a destination of its own.",
        )
    if honoured:
        yield from tried("s3", f"reads {probe}", lambda: store.head(probe, role="output"))


def _fleet(ledger: Ledger, jobs: list[Job]) -> Iterator[Finding]:
    """Fills `jobs` with the open ones, newest last."""
    jobs.extend(ledger.open_jobs())
    if ledger.is_dispatched():
        yield ok("queues", "A dispatcher is active.")
    else:
        yield error(
            "queues",
            "no_dispatcher",
            "No dispatcher is active: nothing is fed, retried or closed.",
            "Start one: cutfleet dispatch. A second one may stand by.",
        )
    workers = ledger.workers()
    if not workers:
        yield warning("workers", "no_workers", "No worker runs.", "Start one a GPU: python -m workers.")
    for node, facts in workers.items():
        yield from _worker(node, facts)
    yield from _alike(workers)
    yield from _queues(ledger, jobs, set(count_served(workers)))


def _worker(node: str, facts: Mapping[str, str]) -> Iterator[Finding]:
    ours, theirs = importlib.metadata.version("cutfleet"), facts.get("version", "an older version")
    idle_s, waiting = float(facts.get("idle_s", 0)), int(facts.get("waiting", 0))
    state = ", draining" if facts["draining"] == "1" else ""
    yield ok(
        "workers",
        f"{node}: {facts['model']} on {facts['device']} in {facts['dtype']}, {facts['images']} images, "
        f"{facts['in_flight']} in flight, last progress {idle_s:.0f} s ago{state}.",
    )
    if theirs != ours:
        yield warning(
            "workers",
            "versions_differ",
            f"{node} runs {theirs}, this is {ours}.",
            "Restart it with this version; old and new work side by side meanwhile.",
        )
    if waiting and idle_s > STUCK_S:
        yield error(
            "workers",
            "worker_stuck",
            f"{node} has {waiting} images before its device and made no progress.",
            "Look at its log and at nvidia-smi; restart it: its images go to others when their leases end.",
        )
    preset = PRESETS.get(facts["model"])
    if facts["device"] == "cpu" and preset is not None and preset.parameters_m > CPU_MODEL_M:
        yield warning(
            "workers",
            "gpu_not_used",
            f"{node} serves {facts['model']} on a CPU.",
            "Set CUTFLEET_DEVICE=cuda, which says why there is no GPU; or serve u2netp.",
        )


def _alike(workers: Mapping[str, Mapping[str, str]]) -> Iterator[Finding]:
    revisions = collections.defaultdict(set)
    for facts in workers.values():
        revisions[facts["model"]].add(facts["revision"])
    for model, found in revisions.items():
        if len(found) > 1:
            yield error(
                "workers",
                "models_differ",
                f"Workers serve {model} with different weights: {', '.join(found)}.",
                "Pin one with CUTFLEET_MODEL_REVISION and restart them: a job's images must come from one model.",
            )


def _queues(ledger: Ledger, jobs: Sequence[Job], served: set[str]) -> Iterator[Finding]:
    for job in jobs:
        if job.paused is not None:
            yield warning(
                "queues",
                "job_paused",
                f"Job {job.id} is paused with {job.open} images open: {job.paused}",
                f"Mend the cause, then: cutfleet unpause {job.id}",
            )
    models = {job.model for job in jobs}
    for model in sorted(models | served):
        count = sum(job.open for job in jobs if job.model == model)
        live = lane_queue("live", model)
        sizes = ledger.survey(worker_queues(model)).queues
        if count and model not in served:
            yield error(
                "queues",
                "model_not_served",
                f"{count} images wait for {model}, which no running worker serves.",
                "Start a worker on a CPU." if model == RENDER else f"Start a worker with CUTFLEET_MODEL={model}.",
            )
        elif sizes[live][1] > LIVE_WAITS_S:
            yield warning(
                "queues",
                "live_waits",
                f"The oldest live image for {model} waits {sizes[live][1]:.0f} s.",
                "Start more workers, or see above why those that run are slow.",
            )
        else:
            lengths = ", ".join(f"{length} on {queue}" for queue, (length, _) in sizes.items())
            yield ok("queues", f"{count} images open for {model}; {lengths}.")


def _newest(jobs: Sequence[Job], name: str) -> str | None:
    return getattr(jobs[-1], name) if jobs else None
