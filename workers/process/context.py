"""The parts of a worker process that its tasks use; `workers/serve.py` starts and stops them."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable

from jobs.job import Job
from jobs.ledger import Ledger
from jobs.s3.client import Store
from jobs.settings import Settings
from workers.imaging.decode import Limits
from workers.models import LoadedModel
from workers.models.batcher import Batcher
from workers.process.decode_process import DecodeProcess
from workers.process.gate import IsolationGate
from workers.process.leases import Leases
from workers.process.memory import MemoryBudget
from workers.process.metrics import WorkerMetrics
from workers.process.watchdog import Watchdog

_CACHED_JOBS = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerContext:
    """`draining`: set on SIGTERM and when the process must end; no new image starts after it. `decode_process`: decodes
    suspects."""

    settings: Settings
    node: str
    draining: threading.Event
    model: LoadedModel
    batcher: Batcher
    ledger: Ledger
    store: Store
    leases: Leases
    metrics: WorkerMetrics
    gate: IsolationGate
    memory: MemoryBudget
    watchdog: Watchdog
    decode_process: DecodeProcess

    @functools.cached_property
    def limits(self) -> Limits:
        """Return the limits of sources."""
        settings = self.settings
        return Limits(max_pixels=int(settings.max_pixels_mp * 1e6), max_bytes=int(settings.max_bytes_mb * 1e6))

    @functools.cached_property
    def find_job(self) -> Callable[[str], Job]:
        """Return a job by its id, from a cache: use only what never changes of it (source, destination, recipe, kind,
        conditional). Raises `JobError` for an unknown job, `SettingsError` if a later version wrote its recipe."""

        def find(job_id: str) -> Job:
            job = self.ledger.jobs.get(job_id)
            _ = job.recipe  # parsed here, so that a job with an unreadable recipe is not cached
            return job

        return functools.lru_cache(maxsize=_CACHED_JOBS)(find)
