"""`python -m workers`: pin the device, load and warm the model, serve, drain on SIGTERM.

It takes no options: settings are the variables CUTFLEET_* (README).

`python -m workers sheet FOLDER` draws a contact sheet of what a job made, `python -m workers compare` measures models
on one's own images. Whatever needs pixels is a command here: `cutfleet` itself never imports an image library.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if __name__ == "__main__" and not sys.argv[1:]:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # before imports that take a while; `serve` has its own

from jobs.catalogue import PRESETS
from jobs.errors import CutfleetError, SettingsError
from jobs.logs import set_up_logs
from jobs.settings import Settings, load_settings

if TYPE_CHECKING:
    import torch

    from workers.models import LoadedModel

log = logging.getLogger("workers")

COMMANDS = {"compare": "workers.tools.compare", "sheet": "workers.tools.contact_sheet"}
EXIT_SETTINGS = 2
"""Starting again can't help: supervisors should stop at this one, and at no other."""
EXIT_UNREACHABLE = 4
EXIT_BUG = 71
EXIT_DRAIN_DEADLINE = 75
GPU_SLOTS, GPU_BATCH = 24, 8
SLOTS_PER_CORE = 2
DRAIN_SHARE = 0.8
"""Of the grace; the rest is for giving back what did not finish."""


def main(argv: list[str]) -> int:
    if argv:
        if argv[0] in ("-h", "--help"):
            print(__doc__)
            return 0
        if argv[0] in COMMANDS:
            return int(importlib.import_module(COMMANDS[argv[0]]).main(argv[1:]))
        print(
            f"python -m workers: unknown command {argv[0]!r}. Known: {', '.join(COMMANDS)}; no command: serve.",
            file=sys.stderr,
        )
        return 2
    try:
        settings = load_settings()
        set_up_logs(settings.log_format)
        return serve(settings)
    except CutfleetError as exc:
        print(f"python -m workers: {exc} [{exc.code}]", file=sys.stderr)
        return EXIT_SETTINGS if isinstance(exc, SettingsError) else EXIT_UNREACHABLE


def serve(settings: Settings) -> int:
    """Returns the exit code. Raises `ModelError` before anything is taken off a queue."""
    draining = threading.Event()
    _leave_when_told(draining)
    from workers.process.crash_reporter import LastWord

    last_word = LastWord(settings)
    if settings.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(settings.gpu)  # before torch is imported
    from jobs.broker import consume, make_app
    from jobs.ledger import Ledger
    from jobs.liveness import AliveFile
    from jobs.s3.client import Store
    from workers.imaging.pipeline import limit_threads
    from workers.models.batcher import Predictor
    from workers.process.gpu_lock import claim_device, claim_name
    from workers.process.heartbeat import Facts, Rate, flower_name, node_name, worker_facts
    from workers.process.isolation import Room
    from workers.process.kombu_patches import harden
    from workers.process.leases import Leases
    from workers.process.memory import MemoryBudget, image_budget, resident_bytes, resident_limit
    from workers.process.metrics import WorkerMetrics
    from workers.process.nvml import find_gpu
    from workers.process.watchdog import Watchdog
    from workers.tasks.task import Bench, register

    started = time.monotonic()
    alive = AliveFile(settings.alive_file)
    cores = len(os.sched_getaffinity(0))
    device, _held_gpu = claim_device(settings)  # held as long as this function runs
    on_gpu = device.type == "cuda"
    node = node_name(settings, on_gpu=on_gpu)
    _held_name = claim_name(node)
    model = _load(settings, device)
    slots = settings.slots or (GPU_SLOTS if on_gpu else SLOTS_PER_CORE * cores)
    limit_threads(torch_threads=1 if on_gpu or model.at_once > 1 else cores)
    metrics = WorkerMetrics()
    rate = Rate()
    with (
        Predictor(model, batch_limit=settings.batch_limit or (GPU_BATCH if on_gpu else model.at_once)) as predictor,
        Ledger(settings.redis_url, name=settings.redis_name) as ledger,
        Store.of(settings, connections=slots + 4) as store,
    ):
        metrics.listen(ledger=ledger, store=store)
        predictor.warm_up()
        limit = resident_limit(settings.memory_mb, on_gpu=on_gpu)
        budget = image_budget(limit, own_bytes=resident_bytes())

        def facts() -> Facts:
            return worker_facts(model, predictor, rate, slots=slots, draining=draining.is_set())

        ledger.ping()
        with (
            Leases(ledger, node=node, lease_s=settings.lease_s, facts=facts) as leases,
            metrics.serve(settings.metrics_port),
        ):
            metrics.watch(model, predictor, leases, gpu=find_gpu(model.device), slots=slots, draining=draining)
            bench = Bench(
                settings=settings,
                node=node,
                ledger=ledger,
                store=store,
                model=model,
                predictor=predictor,
                leases=leases,
                metrics=metrics,
                draining=draining,
                room=Room(leaving=draining),
                memory=MemoryBudget(budget, leaving=draining),
                watchdog=Watchdog(predictor, leases, last_word, draining=draining, limit_bytes=limit),
            )
            app = make_app(settings.redis_url)
            consume(app, model.name, renders=not on_gpu)
            app.conf.update({f"cutfleet_{name}": value for name, value in facts().items()})  # Flower: a worker's Config
            harden(app, alive)
            register(app, bench)
            seconds = round(time.monotonic() - started, 1)
            memory = {"memory_mb": limit // 1_000_000, "images_mb": budget // 1_000_000}
            log.info("ready", extra={"action": "start", "node": node, "seconds": seconds, **memory, **facts()})
            return _run(app, bench, slots, name=flower_name(node, facts()))


def _leave_when_told(draining: threading.Event) -> None:
    """While it starts it holds no image, so SIGTERM ends it at once; Celery's own handler takes the place of this one.
    The event outlasts an exit that a library swallows."""

    def leave(*_: object) -> None:
        draining.set()
        sys.exit(0)

    signal.signal(signal.SIGTERM, leave)


def _load(settings: Settings, device: torch.device) -> LoadedModel:
    """The model under the name that its queues bear: a preset's own, else the name with the hash of its weights."""
    from workers.models import load

    model = load(
        settings.model,
        device=device.type,
        dtype=settings.dtype,
        accept_licence=settings.accept_licence,
        compiled=settings.compile,
        trust_remote_code=settings.trust_remote_code,
        revision=settings.model_revision,
    )
    return model if settings.model in PRESETS else replace(model, name=model.served_name)


def _run(app: Any, bench: Any, slots: int, *, name: str) -> int:
    """Celery's worker in this thread until it is told to go. On SIGTERM:

    1. Celery stops consuming and `draining` is set: no new image starts.
    2. Images past fetching finish and are recorded; the others give their claim back.
    3. After most of the grace, what still runs is given back and the process leaves regardless.
    """
    from celery import signals

    def on_shutdown(**_: Any) -> None:
        log.info("draining", extra={"action": "drain", "in_flight": bench.leases.in_flight()})
        bench.draining.set()
        deadline = threading.Timer(DRAIN_SHARE * bench.settings.drain_s, _leave, args=(bench,))
        deadline.daemon = True
        deadline.start()

    threading.excepthook = _end_on_a_bug
    signals.setup_logging.connect(_keep_our_logs)
    signals.worker_shutting_down.connect(on_shutdown)
    threading.Thread(target=bench.watchdog.watch, name="watch", daemon=True).start()
    worker = app.Worker(
        hostname=name,
        pool="threads",
        concurrency=slots,
        quiet=True,
        without_gossip=True,
        without_mingle=True,
        task_events=True,
    )
    if not bench.draining.is_set():
        worker.start()
    log.info("gone", extra={"action": "drain", "node": bench.node})
    return int(worker.exitcode or bench.watchdog.exit_code)


def _keep_our_logs(**_: Any) -> None:
    """A receiver of this signal keeps Celery from setting up logging of its own."""


def _end_on_a_bug(failed: threading.ExceptHookArgs) -> None:
    """A thread of ours that is gone (leases, device, watch) would leave a worker that only looks alive."""
    log.critical("thread ended by a bug", exc_info=failed.exc_value, extra={"action": "end"})
    logging.shutdown()
    os._exit(EXIT_BUG)


def _leave(bench: Any) -> None:
    code = bench.watchdog.exit_code or EXIT_DRAIN_DEADLINE
    log.error("the grace is over: giving back what still runs", extra={"action": "drain"})
    left_s = (1 - DRAIN_SHARE) / 2 * bench.settings.drain_s
    threading.Timer(left_s, os._exit, args=(code,)).start()  # Redis may be away too
    bench.leases.release_all()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
