"""The worker put together: its parts in the order in which they start, and how it drains.

Start, after what `workers/__main__.py` does before torch is imported: lock the device and the node's name, load the
model, start the device thread, warm up, reach Redis, start leases and metrics, consume. Parts stop in the reverse
order, so both locks last as long as the worker serves. No message is taken before all parts work."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from celery import Celery, signals

from jobs.broker import consume, make_app
from jobs.catalogue import PRESETS
from jobs.ledger import Ledger
from jobs.liveness import LivenessFile
from jobs.s3.client import Store
from jobs.settings import Settings
from workers.models import LoadedModel, load
from workers.models.batcher import Batcher
from workers.models.device import limit_threads
from workers.process.context import WorkerContext
from workers.process.crash_reporter import CrashReporter
from workers.process.decode_process import DecodeProcess
from workers.process.exit_codes import ExitCode
from workers.process.gate import IsolationGate
from workers.process.gpu_lock import lock_device, lock_node
from workers.process.heartbeat import HeartbeatFields, HeartbeatSource, flower_name, node_name
from workers.process.kombu_patches import install_patches
from workers.process.leases import Leases
from workers.process.memory import MemoryBudget, image_budget, resident_bytes, resident_limit
from workers.process.metrics import WorkerMetrics
from workers.process.nvml import find_gpu
from workers.process.watchdog import Watchdog
from workers.tasks.task import register

log = logging.getLogger(__name__)

GPU_SLOTS, GPU_BATCH = 24, 8
SLOTS_PER_CORE = 2
DRAIN_SHARE = 0.8
"""Share of `CUTFLEET_DRAIN_S` for images to finish; the rest is for releasing those that did not."""


@dataclasses.dataclass(frozen=True)
class _Device:
    """`slots`: most images in flight."""

    node: str
    model: LoadedModel
    batcher: Batcher
    slots: int

    @property
    def on_gpu(self) -> bool:
        return self.model.device.type == "cuda"


def serve(settings: Settings, *, draining: threading.Event, crash_reporter: CrashReporter) -> int:
    """Serve until SIGTERM; return the exit code. Raises `SettingsError` or `ServiceUnavailable` before the first
    message is taken."""
    started = time.monotonic()
    liveness = LivenessFile(settings.alive_file)
    with _open_device(settings) as device:
        heartbeat = HeartbeatSource(device.model, device.batcher, slots=device.slots, draining=draining)
        with _open_worker(device, settings, heartbeat, draining, crash_reporter) as worker:
            fields = heartbeat.fields()
            app = _make_app(worker, liveness, fields, renders=not device.on_gpu)
            megabytes = {"memory_mb": worker.watchdog.limit_bytes, "images_mb": worker.memory.total_bytes}
            log.info(
                "ready",
                extra={"action": "start", "node": worker.node, "seconds": round(time.monotonic() - started, 1)}
                | {name: size // 1_000_000 for name, size in megabytes.items()}
                | dict(fields),
            )
            return _run(app, worker, slots=device.slots, name=flower_name(worker.node, fields))


@contextmanager
def _open_device(settings: Settings) -> Iterator[_Device]:
    """Lock the device and the node's name, load the model, start the device thread."""
    cores = len(os.sched_getaffinity(0))
    with lock_device(settings) as torch_device:
        on_gpu = torch_device.type == "cuda"
        node = node_name(settings, on_gpu=on_gpu)
        with lock_node(node):
            model = _load_model(settings, torch_device)
            limit_threads(torch_threads=1 if on_gpu or model.at_once > 1 else cores)
            batch_limit = settings.batch_limit or (GPU_BATCH if on_gpu else model.at_once)
            with Batcher(model, batch_limit=batch_limit) as batcher:
                slots = settings.slots or (GPU_SLOTS if on_gpu else SLOTS_PER_CORE * cores)
                yield _Device(node, model, batcher, slots)


def _load_model(settings: Settings, device: torch.device) -> LoadedModel:
    """Return the model under the name of its queues: a preset's own, else with the hash of its weights."""
    model = load(
        settings.model,
        device=device.type,
        dtype=settings.dtype,
        accept_licence=settings.accept_licence,
        compiled=settings.compile,
        trust_remote_code=settings.trust_remote_code,
        revision=settings.model_revision,
    )
    return model if settings.model in PRESETS else dataclasses.replace(model, name=model.served_name)


@contextmanager
def _open_worker(
    device: _Device,
    settings: Settings,
    heartbeat: HeartbeatSource,
    draining: threading.Event,
    crash_reporter: CrashReporter,
) -> Iterator[WorkerContext]:
    """Warm up, reach Redis, start the heartbeat, the leases and `/metrics`."""
    model, batcher, metrics = device.model, device.batcher, WorkerMetrics()
    with (
        Ledger(settings.redis_url, name=settings.redis_name) as ledger,
        Store.of(settings, connections=device.slots + 4) as store,
    ):
        metrics.count_requests(ledger=ledger, store=store)
        batcher.warm_up()
        limit_bytes = resident_limit(settings.memory_mb, on_gpu=device.on_gpu)
        budget_bytes = image_budget(limit_bytes, own_bytes=resident_bytes())
        ledger.ping()
        with (
            Leases(ledger, node=device.node, lease_s=settings.lease_s, heartbeat=heartbeat.fields) as leases,
            metrics.serve(settings.metrics_port),
        ):
            metrics.observe(model, batcher, leases, gpu=find_gpu(model.device), slots=device.slots, draining=draining)
            watchdog = Watchdog(batcher, leases, crash_reporter, draining=draining, limit_bytes=limit_bytes)
            yield WorkerContext(
                settings=settings,
                node=device.node,
                draining=draining,
                model=model,
                batcher=batcher,
                ledger=ledger,
                store=store,
                leases=leases,
                metrics=metrics,
                gate=IsolationGate(draining=draining),
                memory=MemoryBudget(budget_bytes, draining=draining),
                watchdog=watchdog,
                decode_process=DecodeProcess(draining=draining),
            )


def _make_app(worker: WorkerContext, liveness: LivenessFile, fields: HeartbeatFields, *, renders: bool) -> Celery:
    app = make_app(worker.settings.redis_url)
    consume(app, worker.model.name, renders=renders)
    app.conf.update({f"cutfleet_{name}": value for name, value in fields.items()})  # shown in Flower
    install_patches(app, liveness)
    register(app, worker)
    return app


def _run(app: Celery, worker: WorkerContext, *, slots: int, name: str) -> int:
    """Run Celery's worker in this thread until SIGTERM; return the exit code. On SIGTERM:

    1. Celery stops consuming. `draining` is set, so no new image starts.
    2. Images that are past the download finish and are recorded. The others are released.
    3. After `DRAIN_SHARE` of `CUTFLEET_DRAIN_S`, images that still run are released and the process exits.
    """

    def drain(**_: Any) -> None:
        log.info("draining", extra={"action": "drain", "in_flight": worker.leases.in_flight()})
        worker.draining.set()
        deadline = threading.Timer(DRAIN_SHARE * worker.settings.drain_s, _exit_at_deadline, args=(worker,))
        deadline.daemon = True
        deadline.start()

    threading.excepthook = _exit_on_unexpected_error
    signals.setup_logging.connect(_keep_our_logs)
    signals.worker_shutting_down.connect(drain)
    threading.Thread(target=worker.watchdog.run, name="watchdog", daemon=True).start()
    celery_worker = app.Worker(
        hostname=name,
        pool="threads",
        concurrency=slots,
        quiet=True,
        without_gossip=True,
        without_mingle=True,
        task_events=True,
    )
    if not worker.draining.is_set():
        celery_worker.start()
    log.info("stopped", extra={"action": "drain", "node": worker.node})
    return int(celery_worker.exitcode or worker.watchdog.exit_code)


def _keep_our_logs(**_: Any) -> None:
    """A receiver of this signal keeps Celery from replacing our logging."""


def _exit_on_unexpected_error(failed: threading.ExceptHookArgs) -> None:
    """End the process: without one of our threads (leases, device, watchdog) it would only seem to work."""
    log.critical("thread ended by an unexpected error", exc_info=failed.exc_value, extra={"action": "end"})
    logging.shutdown()
    os._exit(ExitCode.BUG)


def _exit_at_deadline(worker: WorkerContext) -> None:
    code = worker.watchdog.exit_code or ExitCode.DRAIN_DEADLINE
    log.error("drain deadline (CUTFLEET_DRAIN_S): releasing images that still run", extra={"action": "drain"})
    left_s = (1 - DRAIN_SHARE) / 2 * worker.settings.drain_s
    threading.Timer(left_s, os._exit, args=(code,)).start()  # Redis may be unavailable too
    worker.leases.release_all()
    os._exit(code)
