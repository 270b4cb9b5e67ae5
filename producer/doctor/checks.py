"""`cutfleet doctor`: checks everything that a fleet depends on, and names a remedy for each problem. It writes nothing
but one small object: `TO/_cutfleet/doctor/probe.json`.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator

from jobs.errors import CutfleetError
from jobs.job import Job
from jobs.ledger import Ledger
from jobs.s3.client import Store
from jobs.s3.location import Location
from jobs.settings import Settings, load_settings
from producer.doctor.findings import Finding, Level, catch, from_error, ok, warning
from producer.doctor.fleet_checks import check_fleet
from producer.doctor.redis_checks import check_redis
from producer.doctor.store_checks import check_store

MIN_FREE_GB = 1.0
"""Sorting a manifest of ten million keys takes about this."""
CONNECTIONS = 4


def examine(
    *, source: Location | None = None, destination: Location | None = None, now: Callable[[], float] = time.time
) -> Iterator[Finding]:
    """Yield each finding as it is made. `source`, `destination`: prefixes to try; None: those of the newest open
    job."""
    try:
        settings = load_settings()
    except CutfleetError as exc:
        yield from_error("settings", exc)
        return
    yield from _describe_settings(settings)
    yield from _check_disk()
    reported: set[str] = set()
    with Ledger(settings.redis_url, name=settings.redis_name) as ledger:
        for finding in catch("redis", lambda: check_redis(ledger, now)):
            reported.add(finding.code)
            yield finding
        jobs = _open_jobs(ledger)
        fleet = list(catch("workers", lambda: check_fleet(ledger, jobs)))
    with Store.of(settings, connections=CONNECTIONS) as store:
        if jobs:
            source, destination = source or jobs[-1].source, destination or jobs[-1].destination
        yield from check_store(store, source, destination)
    yield from (finding for finding in fleet if finding.level is Level.OK or finding.code not in reported)


def _describe_settings(settings: Settings) -> Iterator[Finding]:
    yield ok("settings", f"Redis at {settings.redis_name}, S3 at {settings.s3_name}, model {settings.model}.")
    sources, destinations = settings.sources or "any", settings.destinations or "any"
    yield ok("settings", f"Allowed sources: {sources}; destinations: {destinations}.")


def _check_disk() -> Iterator[Finding]:
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


def _open_jobs(ledger: Ledger) -> list[Job]:
    with contextlib.suppress(CutfleetError):  # the checks report it
        return ledger.jobs.open()
    return []
