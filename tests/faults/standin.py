"""Workers for fault tests: the worker itself, with a stand-in for the device and with failpoints, forked in an instant.

    python tests/faults/standin.py

imports everything once, then forks a process for each line on stdin, {"env": {...}, "log": PATH, "command": [...]},
and writes {"started": PID} and {"ended": PID, "code": N} on stdout. It is `workers.__main__.main` as it is, or, with a
command, `cutfleet`. Stand-ins are the device (grey level from the image's own pixels, `CUTFLEET_TEST_DEVICE_MS` a
image; what NVML says of it) and long times: of the broker, of the S3 client and of the dispatcher's lock.

`CUTFLEET_TEST_FAILPOINTS=NAME=FILE,...`: the first process that passes the place NAME makes FILE and kills itself with
SIGKILL; `CUTFLEET_TEST_FREEZEPOINTS`: freezes itself with SIGSTOP. Images that hold one of the poisons of `terms` do
what it says, wherever they are decoded. `CUTFLEET_TEST_STALL_S`: what the watchdog, the device and a child's deadline
call no progress. `CUTFLEET_TEST_VERSION=2`: as a later version could be, whose messages and recipes say more than ours
can read, and which reads ours.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import botocore.config
import redis
import torch
from torch import Tensor

import jobs.broker
import jobs.message
import producer.cli.main
import producer.dispatcher.dispatcher
import producer.dispatcher.feeder
import producer.dispatcher.job_backoff
import producer.records.manifest
import producer.records.report
import workers.__main__
import workers.imaging.decode
import workers.models
import workers.process.kombu_patches
import workers.process.nvml
import workers.tasks.task
from jobs.ledger import Ledger
from jobs.recipe import Recipe
from jobs.s3.client import Store
from tests.faults.terms import (
    DEVICE_GREY,
    DEVICE_HANGS,
    DEVICE_SEGFAULT,
    EXHAUST,
    HANG,
    LEAK,
    LEAK_BYTES,
    LOCK,
    LOCK_S,
    MODEL,
    SEGFAULT,
    SOCKET_S,
    TURN_S,
    VISIBILITY_S,
)
from workers.models import LoadedModel
from workers.models.batcher import Predictor
from workers.process.nvml import Gpu, GpuUse

SIZE = (64, 64)


def load(*args: object, **options: object) -> LoadedModel:
    device_s = float(os.environ.get("CUTFLEET_TEST_DEVICE_MS", "0")) / 1000

    def forward(x: Tensor) -> Tensor:
        time.sleep(device_s * len(x))
        grey = (x * 0.5 + 0.5).mean(dim=1, keepdim=True)
        levels = grey.flatten(1).amin(1) * 255
        if ((levels > DEVICE_SEGFAULT - 1) & (levels < DEVICE_SEGFAULT + 1)).any():
            ctypes.string_at(0)
        while ((levels > DEVICE_HANGS - 1) & (levels < DEVICE_HANGS + 1)).any():
            time.sleep(1)
        if (levels > DEVICE_GREY - 1).any():
            raise RuntimeError("an illegal memory access was encountered")
        return grey

    return LoadedModel(
        name=MODEL,
        revision="0" * 64,
        input_size=SIZE,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        licence="none",
        device=torch.device("cpu"),
        dtype=torch.float32,
        forward=forward,
    )


class Card(Gpu):
    """A GPU of 16 GiB, as NVML would show it."""

    def __init__(self) -> None:
        pass

    def use(self) -> GpuUse:
        return GpuUse(0.5, 3 * 2**30, 16 * 2**30)


_one_at_a_time = threading.Lock()


def _pass(place: str) -> None:
    for variable, number in (("FAILPOINTS", signal.SIGKILL), ("FREEZEPOINTS", signal.SIGSTOP)):
        text = os.environ.get(f"CUTFLEET_TEST_{variable}", "")
        flag = dict(pair.split("=", 1) for pair in text.split(",") if pair).get(place)
        with _one_at_a_time:  # a process that is killed at one place passes no other meanwhile
            if flag is not None and _is_first(flag):
                os.kill(os.getpid(), number)


def _is_first(flag: str) -> bool:
    try:
        os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _around(owner: Any, name: str, *, before: str = "", after: Callable[[tuple[Any, ...], Any], str]) -> None:
    real = getattr(owner, name)

    def call(*args: Any, **options: Any) -> Any:
        if before:
            _pass(before)
        result = real(*args, **options)
        _pass(after(args, result))
        return result

    setattr(owner, name, call)


def _note(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # at once: threads of one process, and processes, share the log


def _put_place(args: tuple[Any, ...], _: Any) -> str:
    if "masks/" in args[1].key:
        return "after_mask"
    _note(f"published {args[1]}")
    return "after_cutout"


def _claim_place(_: tuple[Any, ...], claim: Any) -> str:
    if claim.verdict != "go":
        _note(f"refused {claim.image} {claim.verdict}")
        return ""
    _note(f"claimed {claim.image}")
    return "after_claim"


def _arm() -> None:
    _around(Ledger, "claim", after=_claim_place)
    _around(Store, "get", after=lambda *_: "after_fetch")
    _around(Predictor, "predict", after=lambda *_: "after_model")
    _around(Store, "put", after=_put_place)
    _around(workers.process.kombu_patches.kombu_redis.QoS, "restore_by_tag", before="giving_back", after=lambda *_: "")
    _around(Ledger, "finish", before="before_commit", after=lambda *_: "before_ack")
    _around(Ledger, "vanish", before="before_blame", after=lambda *_: "")
    for name in ("create_job", "is_next_part", "add_part", "submit_live", "feed", "close_job"):
        _around(Ledger, name, before=f"before_{name}", after=lambda *_, name=name: f"after_{name}")
    _around(producer.dispatcher.dispatcher, "write_report", after=lambda *_: "after_report")


_leaked: list[bytes] = []


def _poison(data: bytes) -> None:
    if SEGFAULT in data:
        ctypes.string_at(0)
    if LEAK in data:
        _leaked.append(b"x" * LEAK_BYTES)
    if HANG in data:
        _note(f"hangs in {os.getpid()}")
    while HANG in data:
        time.sleep(1)
    if LOCK in data:
        ctypes.PyDLL(None).sleep(3600)
    hoard = []
    while EXHAUST in data:
        hoard.append(b"x" * 50_000_000)


class _Impatient(botocore.config.Config):  # type: ignore[misc]  # it has no types
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"connect_timeout": 2, "read_timeout": SOCKET_S})


def _shorten() -> None:
    """Times that only make tests wait: a dead worker's messages come back within seconds, a dead dispatcher's lock too,
    and who waits for a server in vain gives up sooner."""
    jobs.broker.VISIBILITY_S = VISIBILITY_S
    producer.dispatcher.dispatcher.LOCK_S = LOCK_S
    producer.dispatcher.dispatcher.PAUSE_S = producer.dispatcher.job_backoff.HELD_UP_S = TURN_S
    workers.tasks.task.MAX_HOLD_PAUSE_S = 1.0
    botocore.config.Config = _Impatient  # type: ignore[misc]
    real_app, real_url = jobs.broker.make_app, redis.Redis.from_url

    def make_app(redis_url: str) -> Any:
        app = real_app(redis_url)
        given_s = app.conf.broker_transport_options["unacked_mutex_expire"]
        seen_s = _told("VISIBILITY_S") or VISIBILITY_S
        times = {"visibility_timeout": seen_s, "unacked_restore_interval": 1, "unacked_mutex_expire": given_s / 5}
        times |= {"health_check_interval": 2, "socket_timeout": SOCKET_S}
        if poll_s := _told("POLL_S"):
            times["polling_interval"] = poll_s
        app.conf.broker_transport_options |= times
        return app

    def from_url(url: str, **options: Any) -> Any:
        return real_url(url, **options | {"socket_timeout": SOCKET_S})

    jobs.broker.make_app = make_app
    redis.Redis.from_url = from_url  # type: ignore[method-assign]


_sniff = workers.imaging.decode.sniff_format


def _sniff_poison(data: bytes) -> str:
    _poison(data)
    return _sniff(data)


workers.imaging.decode.sniff_format = (
    _sniff_poison  # here, so that a child that decodes, which imports this file, has it too
)
workers.process.nvml.find_gpu = lambda _: Card()
workers.models.load = load  # type: ignore[assignment]  # the stand-in has the same use
_shorten()


def _told(name: str) -> float | None:
    text = os.environ.get(f"CUTFLEET_TEST_{name}")
    return float(text) if text else None


def _stall_sooner() -> None:
    import workers.models.batcher
    import workers.process.watchdog

    stall_s = _told("STALL_S")
    if stall_s is not None:
        workers.tasks.task.DECODE_S = stall_s
        for module, name in ((workers.models.batcher, "Predictor"), (workers.process.watchdog, "Watchdog")):
            setattr(module, name, functools.partial(getattr(module, name), stall_s=stall_s))


def _set_sizes() -> None:
    import producer.submission.submit

    workers.tasks.task.MAX_HOLD_S = _told("HOLD_S") or workers.tasks.task.MAX_HOLD_S
    producer.dispatcher.dispatcher.PAUSE_S = _told("PAUSE_S") or producer.dispatcher.dispatcher.PAUSE_S
    if rows := _told("PART_ROWS"):
        for module in (
            producer.records.manifest,
            producer.submission.submit,
            producer.dispatcher.feeder,
            producer.dispatcher.dispatcher,
            producer.records.report,
        ):
            module.PART_ROWS = int(rows)  # type: ignore[attr-defined]  # a module's own name


def _renew_as_told() -> None:
    workers.process.kombu_patches.VisibilityLease.every_s = (_told("VISIBILITY_S") or VISIBILITY_S) / 4
    if "CUTFLEET_TEST_UNRENEWED" in os.environ:
        workers.process.kombu_patches.VisibilityLease.every_s = 3600


def _be_later() -> None:
    if "CUTFLEET_TEST_VERSION" not in os.environ:
        return
    later = int(os.environ["CUTFLEET_TEST_VERSION"])
    jobs.message.VERSION, jobs.message.READS = later, (later - 1, later)
    ours, read = Recipe.to_json, Recipe.from_json
    Recipe.to_json = lambda recipe: json.dumps({**json.loads(ours(recipe)), "glow": 1})  # type: ignore[method-assign]
    Recipe.from_json = lambda text: read(  # type: ignore[method-assign,assignment]
        json.dumps({name: value for name, value in json.loads(text).items() if name != "glow"})
    )


def _run(request: dict[str, Any]) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, null), (1, log), (2, log)):
        os.dup2(source, target)
    os.environ.update(request["env"])
    if clock := os.environ.get("CUTFLEET_TEST_CLOCK"):
        os.environ["FAKETIME"] = clock
    _arm()
    _be_later()
    _renew_as_told()
    _stall_sooner()
    _set_sizes()
    if request["command"]:
        producer.cli.main.main(request["command"], prog_name="cutfleet")
    sys.exit(workers.__main__.main([]))


def _warm_imports() -> None:
    import cv2  # noqa: F401
    from celery.apps.worker import Worker  # noqa: F401
    from celery.concurrency.thread import TaskPool  # noqa: F401
    from celery.worker.consumer import Consumer  # noqa: F401

    import producer.submission.submit
    import producer.webhooks.delivery  # noqa: F401


def _tell(**facts: int) -> None:
    os.write(1, json.dumps(facts).encode() + b"\n")


def main() -> None:
    _warm_imports()
    _tell(ready=os.getpid())
    pending = b""
    while True:
        if select.select([0], [], [], 0.02)[0]:
            chunk = os.read(0, 65_536)
            if not chunk:
                return
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                child = os.fork()
                if child == 0:
                    _run(json.loads(line))
                _tell(started=child)
        _reap()


def _reap() -> None:
    while True:
        try:
            child, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not child:
            return
        _tell(ended=child, code=os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
