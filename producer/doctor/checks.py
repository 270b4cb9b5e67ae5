"""`cutfleet doctor`: checks everything that a fleet depends on, and names a remedy for each problem. It writes nothing
but one small object: `TO/_cutfleet/doctor/probe.json`.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.metadata
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jobs.catalogue import PRESETS
from jobs.errors import CutfleetError
from jobs.job import Job
from jobs.ledger import Ledger
from jobs.ledger.fleet import Heartbeat, count_workers
from jobs.message import RENDER_POOL, queue_name, worker_queues
from jobs.recipe import Recipe
from jobs.s3.client import S3Object, Store
from jobs.s3.location import Location
from jobs.s3.names import record_path
from jobs.settings import load_settings
from producer.doctor.findings import Finding, Level, error, ok, warning
from producer.submission.validation import check_no_overlap

MIN_FREE_GB = 1.0
"""Sorting a manifest of ten million keys takes about this."""
CONNECTIONS = 4
OLDEST_REDIS = (7, 2)
PINGS = 20
SLOW_REDIS_MS, SLOW_S3_MS = 10.0, 1000.0
FULL, NEARLY_FULL = 0.95, 0.8
CLOCK_S = 5.0
STUCK_S = 120.0
"""A worker whose device has images to compute makes progress far more often, even on a loaded CPU."""
LIVE_WAIT_S = 60.0
CPU_PARAMETERS_M = 10.0
"""Millions of weights; a larger model takes many seconds an image on a CPU."""

Info = Mapping[str, Any]
"""Redis's INFO."""


def examine(
    *, source: Location | None = None, destination: Location | None = None, now: Callable[[], float] = time.time
) -> Iterator[Finding]:
    """Yield each finding as it is made. `source`, `destination`: prefixes to try; None: those of the newest open job.
    `now`: this machine's clock as Unix time."""
    try:
        settings = load_settings()
    except CutfleetError as exc:
        yield error("settings", exc.code, str(exc))
        return
    yield ok("settings", f"Redis at {settings.redis_name}, S3 at {settings.s3_name}, model {settings.model}.")
    sources, destinations = settings.sources or "any", settings.destinations or "any"
    yield ok("settings", f"Allowed sources: {sources}; destinations: {destinations}.")
    yield _check_disk()
    jobs: list[Job] = []
    reported: set[str] = set()
    with Ledger(settings.redis_url, name=settings.redis_name) as ledger:
        for finding in _catch("redis", lambda: _check_redis(ledger, now)):
            reported.add(finding.code)
            yield finding
        with contextlib.suppress(CutfleetError):  # the checks report it
            jobs = ledger.jobs.open()
        fleet = list(_catch("workers", lambda: _check_fleet(ledger, jobs)))
    with Store.of(settings, connections=CONNECTIONS) as store:
        if jobs:
            source, destination = source or jobs[-1].source, destination or jobs[-1].destination
        yield from _check_store(store, source, destination)
    yield from (finding for finding in fleet if finding.level is Level.OK or finding.code not in reported)


def _catch(area: str, check: Callable[[], Iterator[Finding] | None]) -> Iterator[Finding]:
    """Yield the findings of `check`, and one for the error of ours that ends it."""
    try:
        yield from check() or ()
    except CutfleetError as exc:
        yield error(area, exc.code, str(exc))


def _check_disk() -> Finding:
    folder = tempfile.gettempdir()
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < MIN_FREE_GB:
        return warning("disk", "disk_full", f"{folder} has {free_gb:.1f} GB free; manifests are sorted there.")
    return ok("disk", f"{folder} has {free_gb:.0f} GB free.")


def _check_redis(ledger: Ledger, now: Callable[[], float]) -> Iterator[Finding]:
    info = ledger.server_info()
    times_ms = [_timed_ms(ledger.server_time_s) for _ in range(PINGS)]  # not PING, which fails while it can't save
    median_ms = statistics.median(times_ms)
    name, version = ("Valkey", "valkey_version") if "valkey_version" in info else ("Redis", "redis_version")
    yield ok("redis", f"{name} {info[version]}, answers in {median_ms:.1f} ms.")
    if median_ms > SLOW_REDIS_MS:
        yield warning("redis", "redis_slow", f"Half of its answers take over {median_ms:.0f} ms.")
    yield from _check_redis_server(info)
    yield from _check_memory(info)
    yield from _check_persistence(info)
    ahead_s = ledger.server_time_s() - now()
    if abs(ahead_s) > CLOCK_S:
        yield warning("redis", "clock_differs", f"Its clock is {ahead_s:+.0f} s from this machine's.")


def _check_redis_server(info: Info) -> Iterator[Finding]:
    version = info["redis_version"]  # of Valkey: 7.2.4, the version that it is compatible with
    if tuple(map(int, version.split(".")[:2])) < OLDEST_REDIS:
        oldest = ".".join(map(str, OLDEST_REDIS))
        yield warning("redis", "redis_old", f"Redis {version} is older than {oldest}, and out of support.")
    if info["cluster_enabled"]:
        what = "It runs in cluster mode, where our scripts can't reach all of their keys."
        yield error("redis", "redis_cluster", what)
    if info["role"] != "master":
        yield error("redis", "redis_replica", f"It is a replica of {info.get('master_host')}: it refuses writes.")


def _check_memory(info: Info) -> Iterator[Finding]:
    limit, limit_name = info["maxmemory"], "maxmemory"
    if not limit:
        limit, limit_name = info["total_system_memory"], "the machine's memory"
    share = info["used_memory"] / limit
    text = f"It uses {info['used_memory'] / 1e6:.0f} MB, {share:.0%} of {limit_name}."
    if share >= FULL:
        yield error("redis", "redis_full", text)
    elif share >= NEARLY_FULL:
        yield warning("redis", "redis_nearly_full", text)
    else:
        yield ok("redis", text)
    policy = info["maxmemory_policy"]
    if policy != "noeviction":
        yield error("redis", "redis_evicts", f"It drops keys when it is full: maxmemory-policy {policy}.")


def _check_persistence(info: Info) -> Iterator[Finding]:
    failed = [name for name in ("aof_last_write_status", "rdb_last_bgsave_status") if info.get(name, "ok") != "ok"]
    if failed:
        yield error("redis", "redis_cannot_save", f"It can't write to its disk ({', '.join(failed)}).")
    if info["aof_enabled"]:
        yield ok("redis", "It appends every change to its file.")
    else:
        what = "It appends nothing to disk (appendonly no): a restart loses open jobs."
        yield warning("redis", "redis_forgets", what)


def _check_store(store: Store, source: Location | None, destination: Location | None) -> Iterator[Finding]:
    for option, location in (("--source", source), ("--to", destination)):
        if location is None:
            what = f"No job is open, so no prefix was tried for {option}."
            yield warning("s3", "not_tried", what, remedy=f"Add {option} s3://BUCKET/PREFIX.")
    if source is not None and destination is not None:
        yield from _catch("s3", lambda: check_no_overlap(source, destination, recipe=Recipe(), store=store))
    if source is not None:
        yield from _check_source(store, source)
    if destination is not None:
        yield from _check_destination(store, destination)


def _check_source(store: Store, source: Location) -> Iterator[Finding]:
    first: list[S3Object | None] = []
    yield _try(f"Lists {source}", lambda: first.append(next(store.list_source(source), None)))
    match first:
        case [None]:
            yield warning("s3", "source_empty", f"There are no images under {source}, so none was read.")
        case [S3Object(key=key)]:
            image = source.at(key)
            yield _try(f"Reads {image}", lambda: store.head(image, role="source"))


def _check_destination(store: Store, destination: Location) -> Iterator[Finding]:
    probe = record_path(destination, "doctor", "probe.json")
    missing = destination.below("cutouts/_cutfleet-doctor-missing.png")
    supported: list[bool] = []
    yield _try(f"Finds that {missing} does not exist", lambda: store.head(missing, role="output"))
    yield _try(f"Writes {probe}", lambda: supported.append(store.supports_conditional_writes(probe, b"{}")))
    if supported == [False]:
        what = "The store ignores If-None-Match or If-Match: a worker that lost its lease can overwrite newer outputs."
        yield warning("s3", "conditions_ignored", what)
    if supported:
        yield _try(f"Reads {probe}", lambda: store.head(probe, role="output"))


def _try(action: str, call: Callable[[], object]) -> Finding:
    try:
        took_ms = _timed_ms(call)
    except CutfleetError as exc:
        return error("s3", exc.code, str(exc))
    if took_ms > SLOW_S3_MS:
        return warning("s3", "s3_slow", f"{action}, which took {took_ms / 1000:.1f} s.")
    return ok("s3", f"{action}, in {took_ms:.0f} ms.")


def _timed_ms(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1000


def _check_fleet(ledger: Ledger, jobs: Sequence[Job]) -> Iterator[Finding]:
    """`jobs`: the open ones."""
    if ledger.dispatch.is_active():
        yield ok("queues", "A dispatcher is active.")
    else:
        what = "No dispatcher is active: no image is fed or retried, and no job closes."
        yield error("queues", "no_dispatcher", what)
    workers = ledger.fleet.workers()
    if not workers:
        yield warning("workers", "no_workers", "No worker runs.")
    revisions = collections.defaultdict(set)
    for node, beat in workers.items():
        yield from _check_worker(node, beat)
        revisions[beat["model"]].add(beat["revision"])
    for model, found in revisions.items():
        if len(found) > 1:
            what = f"Workers serve {model} with different weights: {', '.join(found)}."
            yield error("workers", "models_differ", what)
    for job in jobs:
        if job.paused is not None:
            what = f"Job {job.id} is paused with {job.open} images open: {job.paused}"
            remedy = f"Fix the cause, then: cutfleet unpause {job.id}"
            yield warning("queues", "job_paused", what, remedy=remedy)
    served = set(count_workers(workers))
    for model in sorted({job.model for job in jobs} | served):
        count = sum(job.open for job in jobs if job.model == model)
        yield _check_queues(ledger, model, count, is_served=model in served)


def _check_worker(node: str, beat: Heartbeat) -> Iterator[Finding]:
    ours, theirs = importlib.metadata.version("cutfleet"), beat.get("version", "an older version")
    idle_s, waiting = float(beat.get("idle_s", 0)), int(beat.get("waiting", 0))
    state = ", draining" if beat["draining"] == "1" else ""
    yield ok(
        "workers",
        f"{node}: {beat['model']} on {beat['device']} in {beat['dtype']}, {beat['images']} images, "
        f"{beat['in_flight']} in flight, last progress {idle_s:.0f} s ago{state}.",
    )
    if theirs != ours:
        yield warning("workers", "versions_differ", f"{node} runs {theirs}, this is {ours}.")
    if waiting and idle_s > STUCK_S:
        what = f"{node} has {waiting} images for its device and made no progress."
        yield error("workers", "worker_stuck", what)
    preset = PRESETS.get(beat["model"])
    if beat["device"] == "cpu" and preset is not None and preset.parameters_m > CPU_PARAMETERS_M:
        yield warning("workers", "gpu_not_used", f"{node} serves {beat['model']} on a CPU.")


def _check_queues(ledger: Ledger, model: str, count: int, *, is_served: bool) -> Finding:
    """`count`: open images for the model."""
    queues = ledger.window.survey(worker_queues(model)).queues
    _, live_wait_s = queues[queue_name("live", model)]
    if count and not is_served:
        what = f"{count} images wait for {model}, which no running worker serves."
        needed = "on a CPU" if model == RENDER_POOL else f"with CUTFLEET_MODEL={model}"
        return error("queues", "model_not_served", what, remedy=f"Start a worker {needed}.")
    if live_wait_s > LIVE_WAIT_S:
        return warning("queues", "live_waits", f"The oldest live image for {model} waits {live_wait_s:.0f} s.")
    lengths = ", ".join(f"{length} on {queue}" for queue, (length, _) in queues.items())
    return ok("queues", f"{count} images open for {model}; {lengths}.")
