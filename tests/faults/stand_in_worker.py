"""Workers and `cutfleet` commands for fault tests, forked from one process that has imported everything.

    python tests/faults/stand_in_worker.py

forks a process for each line on stdin, {"env": {...}, "log": PATH, "command": [...]}, and writes {"started": PID} and
{"ended": PID, "code": N} to stdout. The process runs `workers.__main__.main`, or `cutfleet` with a command. It differs
from the product in two ways: the device is a stand-in (the mask is the image's grey level, and NVML reports a GPU), and
the long timeouts of broker, S3 client and dispatcher lock are shorter.

Settings of a forked process, in its environment:

CUTFLEET_TEST_DEVICE_MS=N               time of the device for each image
CUTFLEET_TEST_FAILPOINTS=NAME=FILE,...  the first process that reaches NAME creates FILE and kills itself with SIGKILL
CUTFLEET_TEST_FREEZEPOINTS=...          likewise, with SIGSTOP
CUTFLEET_TEST_STALL_S=N                 of the watchdog, the device and the decode subprocess
CUTFLEET_TEST_HOLD_S=N                  longest wait for a service that is away
CUTFLEET_TEST_PAUSE_S=N                 pause between two turns of the dispatcher
CUTFLEET_TEST_PART_ROWS=N               rows of one part of the manifest
CUTFLEET_TEST_VISIBILITY_S=N            visibility timeout of the broker
CUTFLEET_TEST_UNRENEWED=1               messages are not renewed
CUTFLEET_TEST_POLL_S=N                  timeout of one BRPOP
CUTFLEET_TEST_CLOCK=...                 for libfaketime
CUTFLEET_TEST_VERSION=2                 a later version, whose messages and recipes this version can't read

Image contents of `stand_in_settings` cause faults wherever they are decoded.
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
from kombu.transport.redis import QoS
from torch import Tensor

import jobs.broker
import jobs.message
import producer.cli.main
import producer.dispatcher.closing
import producer.dispatcher.dispatcher
import producer.dispatcher.job_backoff
import workers.__main__
import workers.imaging.decode
import workers.serve
import workers.tasks.retry
from jobs.ledger.dispatch import Dispatch
from jobs.ledger.jobs import Jobs
from jobs.ledger.window import Claim, ClaimOutcome, Window
from jobs.recipe import Recipe
from jobs.s3.client import Store
from tests.faults.stand_in_settings import (
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
from workers.models.batcher import Batcher
from workers.process.decode_process import DecodeProcess
from workers.process.kombu_patches import VisibilityLease
from workers.process.nvml import Gpu, GpuUse
from workers.process.watchdog import Watchdog

SIZE = (64, 64)
serve: Any = workers.serve
decode: Any = workers.imaging.decode
message: Any = jobs.message
"""Untyped, because this module replaces their functions and constants."""


def load_stand_in(*args: object, **options: object) -> LoadedModel:
    device_s = (_setting("DEVICE_MS") or 0) / 1000

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


class StandInGpu(Gpu):
    """A GPU of 16 GiB, as NVML would report it."""

    def __init__(self) -> None:
        pass

    def use(self) -> GpuUse:
        return GpuUse(0.5, 3 * 2**30, 16 * 2**30)


def _setting(name: str) -> float | None:
    text = os.environ.get(f"CUTFLEET_TEST_{name}")
    return float(text) if text else None


_one_at_a_time = threading.Lock()


def _reach(point: str) -> None:
    """Kill or freeze this process if a test asks for it at `point`."""
    for variable, number in (("FAILPOINTS", signal.SIGKILL), ("FREEZEPOINTS", signal.SIGSTOP)):
        text = os.environ.get(f"CUTFLEET_TEST_{variable}", "")
        flag = dict(pair.split("=", 1) for pair in text.split(",") if pair).get(point)
        with _one_at_a_time:  # a process that is killed at one point reaches no other meanwhile
            if flag is not None and _is_first(flag):
                os.kill(os.getpid(), number)


def _is_first(flag: str) -> bool:
    try:
        os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _add_points(owner: Any, name: str, *, before: str = "", after: Callable[[tuple[Any, ...], Any], str]) -> None:
    """Reach `before` before each call of a method, and what `after` returns for its arguments and result after it."""
    real = getattr(owner, name)

    def call(*args: Any, **options: Any) -> Any:
        if before:
            _reach(before)
        result = real(*args, **options)
        _reach(after(args, result))
        return result

    setattr(owner, name, call)


def _write_log(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # unbuffered: threads and processes share the log


def _point_after_put(args: tuple[Any, ...], _: object) -> str:
    if "masks/" in args[1].key:
        return "after_mask"
    _write_log(f"published {args[1]}")
    return "after_cutout"


def _point_after_claim(_: tuple[Any, ...], claim: Claim) -> str:
    if claim.outcome is not ClaimOutcome.GO:
        _write_log(f"refused {claim.image} {claim.outcome}")
        return ""
    _write_log(f"claimed {claim.image}")
    return "after_claim"


def _add_all_points() -> None:
    _add_points(Window, "claim", after=_point_after_claim)
    _add_points(Store, "get", after=lambda *_: "after_fetch")
    _add_points(Batcher, "predict", after=lambda *_: "after_model")
    _add_points(Store, "put", after=_point_after_put)
    _add_points(QoS, "restore_by_tag", before="giving_back", after=lambda *_: "")
    _add_points(Window, "finish", before="before_commit", after=lambda *_: "before_ack")
    _add_points(Window, "report_crash", before="before_blame", after=lambda *_: "")
    steps = {
        "create_job": (Jobs, "create"),
        "is_next_part": (Jobs, "is_next_part"),
        "add_part": (Jobs, "add_part"),
        "submit_live": (Jobs, "create_live"),
        "feed": (Dispatch, "feed"),
        "close_job": (Dispatch, "close"),
    }
    for step, (owner, name) in steps.items():
        _add_points(owner, name, before=f"before_{step}", after=lambda *_, step=step: f"after_{step}")
    _add_points(producer.dispatcher.closing, "write_report", after=lambda *_: "after_report")


_leaked: list[bytes] = []


def _cause_fault(data: bytes) -> None:
    if SEGFAULT in data:
        ctypes.string_at(0)
    if LEAK in data:
        _leaked.append(b"x" * LEAK_BYTES)
    if HANG in data:
        _write_log(f"hangs in {os.getpid()}")
    while HANG in data:
        time.sleep(1)
    if LOCK in data:
        ctypes.PyDLL(None).sleep(3600)
    hoard = []
    while EXHAUST in data:
        hoard.append(b"x" * 50_000_000)


class _ShortTimeouts(botocore.config.Config):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"connect_timeout": 2, "read_timeout": SOCKET_S})


def _shorten_timeouts() -> None:
    """Shorten what tests would only wait for: the messages of a dead worker and the lock of a dead dispatcher come back
    within seconds, and clients give up sooner on a server that does not answer."""
    producer.dispatcher.dispatcher.LOCK_S = LOCK_S
    producer.dispatcher.dispatcher.TURN_S = producer.dispatcher.job_backoff.BACKOFF_S = TURN_S
    workers.tasks.retry.MAX_WAIT_PAUSE_S = 1.0
    botocore.config.Config = _ShortTimeouts  # type: ignore[misc]
    real_app, real_url = jobs.broker.make_app, redis.Redis.from_url

    def make_app(redis_url: str) -> Any:
        app = real_app(redis_url)
        mutex_s = app.conf.broker_transport_options["unacked_mutex_expire"]
        visibility_s = _setting("VISIBILITY_S") or VISIBILITY_S
        times = {"visibility_timeout": visibility_s, "unacked_restore_interval": 1, "unacked_mutex_expire": mutex_s / 5}
        times |= {"health_check_interval": 2, "socket_timeout": SOCKET_S}
        if poll_s := _setting("POLL_S"):
            times["polling_interval"] = poll_s
        app.conf.broker_transport_options |= times
        return app

    def from_url(url: str, **options: Any) -> Any:
        return real_url(url, **options | {"socket_timeout": SOCKET_S})

    serve.make_app = make_app
    redis.Redis.from_url = from_url  # type: ignore[method-assign]


_sniff_format: Callable[[bytes], str] = decode.sniff_format


def _sniff_or_fail(data: bytes) -> str:
    _cause_fault(data)
    return _sniff_format(data)


# At module level, because a decode subprocess imports this file and must fail likewise.
decode.sniff_format = _sniff_or_fail
serve.find_gpu = lambda _: StandInGpu()
serve.load = load_stand_in
_shorten_timeouts()


def _shorten_stalls() -> None:
    stall_s = _setting("STALL_S")
    if stall_s is not None:
        serve.Batcher = functools.partial(Batcher, stall_s=stall_s)
        serve.Watchdog = functools.partial(Watchdog, stall_s=stall_s)
        serve.DecodeProcess = functools.partial(DecodeProcess, deadline_s=stall_s)


def _set_sizes() -> None:
    workers.tasks.retry.MAX_WAIT_S = _setting("HOLD_S") or workers.tasks.retry.MAX_WAIT_S
    producer.dispatcher.dispatcher.TURN_S = _setting("PAUSE_S") or producer.dispatcher.dispatcher.TURN_S
    if rows := _setting("PART_ROWS"):
        for name, module in sys.modules.items():
            if name.startswith("producer.") and hasattr(module, "PART_ROWS"):
                vars(module)["PART_ROWS"] = int(rows)


def _set_renewal() -> None:
    VisibilityLease.every_s = (_setting("VISIBILITY_S") or VISIBILITY_S) / 4
    if "CUTFLEET_TEST_UNRENEWED" in os.environ:
        VisibilityLease.every_s = 3600


def _become_later_version() -> None:
    if "CUTFLEET_TEST_VERSION" not in os.environ:
        return
    later = int(os.environ["CUTFLEET_TEST_VERSION"])
    message.VERSION, message.READS = later, (later - 1, later)
    recipe_type: Any = Recipe
    to_json, from_json = Recipe.to_json, Recipe.from_json
    recipe_type.to_json = lambda recipe: json.dumps({**json.loads(to_json(recipe)), "glow": 1})
    recipe_type.from_json = lambda text: from_json(
        json.dumps({name: value for name, value in json.loads(text).items() if name != "glow"})
    )


def _run(request: dict[str, Any]) -> None:
    """Run the forked process; exits."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, null), (1, log), (2, log)):
        os.dup2(source, target)
    os.environ.update(request["env"])
    if clock := os.environ.get("CUTFLEET_TEST_CLOCK"):
        os.environ["FAKETIME"] = clock
    _add_all_points()
    _become_later_version()
    _set_renewal()
    _shorten_stalls()
    _set_sizes()
    if request["command"]:
        producer.cli.main.main(request["command"], prog_name="cutfleet")
    sys.exit(workers.__main__.main([]))


def _import_the_rest() -> None:
    """Import what the product imports inside functions."""
    import cv2  # noqa: F401
    from celery.apps.worker import Worker  # noqa: F401
    from celery.concurrency.thread import TaskPool  # noqa: F401
    from celery.worker.consumer import Consumer  # noqa: F401

    import producer.submission.submit
    import producer.webhooks.delivery  # noqa: F401


def _write_report(**report: int) -> None:
    os.write(1, json.dumps(report).encode() + b"\n")


def main() -> None:
    _import_the_rest()
    _write_report(ready=os.getpid())
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
                _write_report(started=child)
        _reap()


def _reap() -> None:
    while True:
        try:
            child, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not child:
            return
        _write_report(ended=child, code=os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
