"""Heartbeat fields of a worker, which its `ready` log line and `cutfleet workers` show too; and the worker's names."""

from __future__ import annotations

import importlib.metadata
import os
import re
import threading
import time
from collections.abc import Mapping

from jobs.recipe import PIPELINE_VERSION
from jobs.settings import Settings, host_name
from jobs.sliding_rate import SlidingRate
from workers.models import LoadedModel, describe_device
from workers.models.batcher import Batcher

RATE_WINDOW_S = 60.0

HeartbeatFields = Mapping[str, str | int | float]


class HeartbeatSource:
    """Safe for threads."""

    def __init__(self, model: LoadedModel, batcher: Batcher, *, slots: int, draining: threading.Event) -> None:
        self._model = model
        self._batcher = batcher
        self._slots = slots
        self._draining = draining
        self._rate = SlidingRate(RATE_WINDOW_S)
        self._lock = threading.Lock()

    def fields(self) -> HeartbeatFields:
        """`hardware`: the GPU's name and memory. `renders`: 1 if it also takes jobs without a model. `rate`: images per
        second over the last minute. `waiting`: images submitted to the device and not computed yet. `idle_s`: seconds
        since the device made progress, or got the first image after it was idle."""
        model, batcher, now = self._model, self._batcher, time.monotonic()
        with self._lock:
            self._rate.add(batcher.images, now=now)
            rate = round(self._rate.per_second or 0.0, 2)
        return {
            "model": model.name,
            "revision": model.revision,
            "input_size": "x".join(map(str, model.input_size)),
            "pipeline": PIPELINE_VERSION,
            "licence": model.terms,
            "device": str(model.device),
            "hardware": describe_device(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "batch_limit": batcher.batch_limit,
            "slots": self._slots,
            "renders": int(model.device.type != "cuda"),
            "images": batcher.images,
            "waiting": batcher.waiting,
            "idle_s": round(now - batcher.last_progress, 1),
            "version": importlib.metadata.version("cutfleet"),
            "rate": rate,
            "draining": int(self._draining.is_set()),
            "pid": os.getpid(),
        }


def node_name(settings: Settings, *, on_gpu: bool) -> str:
    """Return the worker's name in the ledger and in logs, such as `gpu3@host`."""
    name = settings.node or (f"gpu{settings.gpu or 0}" if on_gpu else f"cpu-{os.getpid()}")
    return f"{name}@{host_name()}"


def flower_name(node: str, fields: HeartbeatFields) -> str:
    """Return Celery's name of the worker, shown in Flower: the node's, with what it runs at the start, such as
    `gpu3-NVIDIA-L4-22-GiB-birefnet-float16-b8@host`."""
    name, _, host = node.partition("@")
    hardware = [] if fields["device"] == "cpu" else [fields["hardware"]]
    parts = [name, *hardware, fields["model"], fields["dtype"], f"b{fields['batch_limit']}"]
    return re.sub(r"[^A-Za-z0-9_.]+", "-", "-".join(map(str, parts))) + f"@{host}"
