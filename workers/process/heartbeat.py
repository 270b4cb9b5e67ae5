"""What a worker says of itself, in its start line and in every heartbeat (hence in `cutfleet workers`); its names."""

from __future__ import annotations

import importlib.metadata
import os
import re
import time
from collections import deque
from collections.abc import Mapping

from jobs.recipe import PIPELINE_VERSION
from jobs.settings import Settings, host_name
from workers.models import LoadedModel, describe_device
from workers.models.batcher import Predictor

RATE_OVER_S = 60.0

Facts = Mapping[str, str | int | float]


class Rate:
    """Images a second over the last minute, of a count that only grows."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def of(self, count: int, *, now: float) -> float:
        """`now`: monotonic seconds. The first count seen gives 0."""
        self._seen.append((now, count))
        while self._seen[-1][0] - self._seen[0][0] > RATE_OVER_S:
            self._seen.popleft()
        (then, before), (last, after) = self._seen[0], self._seen[-1]
        return round((after - before) / (last - then), 2) if last > then else 0.0


def worker_facts(model: LoadedModel, predictor: Predictor, rate: Rate, *, slots: int, draining: bool) -> Facts:
    """`hardware`: the GPU's name and memory. `rate`: images a second over the last minute. `waiting`: images before
    the device; `idle_s`: since it last made progress, or was given the first of them."""
    return {
        "model": model.name,
        "revision": model.revision,
        "input_size": "x".join(map(str, model.input_size)),
        "pipeline": PIPELINE_VERSION,
        "licence": model.terms,
        "device": str(model.device),
        "hardware": describe_device(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_limit": predictor.batch_limit,
        "slots": slots,
        "renders": int(model.device.type != "cuda"),
        "images": predictor.images,
        "waiting": predictor.waiting,
        "idle_s": round(time.monotonic() - predictor.last_progress, 1),
        "version": importlib.metadata.version("cutfleet"),
        "rate": rate.of(predictor.images, now=time.monotonic()),
        "draining": int(draining),
        "pid": os.getpid(),
    }


def node_name(settings: Settings, *, on_gpu: bool) -> str:
    """The worker's name in the ledger and in logs: `gpu3@host`."""
    name = settings.node or (f"gpu{settings.gpu or 0}" if on_gpu else f"cpu-{os.getpid()}")
    return f"{name}@{host_name()}"


def flower_name(node: str, facts: Facts) -> str:
    """Celery's name for the worker, which Flower shows: the node's, with what it runs as it stood at the start, as in
    `gpu3-NVIDIA-L4-22-GiB-birefnet-float16-b8@host`."""
    name, _, host = node.partition("@")
    hardware = [] if facts["device"] == "cpu" else [facts["hardware"]]
    said = [name, *hardware, facts["model"], facts["dtype"], f"b{facts['batch_limit']}"]
    return re.sub(r"[^A-Za-z0-9_.]+", "-", "-".join(map(str, said))) + f"@{host}"
