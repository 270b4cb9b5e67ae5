"""Where a suspect is worked on, an image that two workers went down with: nothing beside it in this process, and its
bytes are decoded in a child process. The child's death, its silence or its hunger convicts the image. So does a fatal
error of this process that names the image a second time: a lost device, or its last word (`workers/process/crash_reporter.py`).
Being killed convicts nobody, but for `MOST_DIED` times while it was computed alone (`workers/process/image_context.py`).
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import logging
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import numpy as np

from jobs.errors import ContentError, TransientError
from workers.imaging.decode import DecodedImage, Limits, decode_image
from workers.process.crash_attribution import Fatal
from workers.process.leases import Draining

log = logging.getLogger(__name__)

DECODE_S = 120.0
"""Far more than the slowest sound image takes alone."""
START_S = 120.0
DECODE_BYTES_PER_PIXEL = 32
"""Most that any of the decoders holds at once, with room to spare."""
CHILD_BYTES = 512_000_000
"""What a child may take beside the pixels: the file, the decoder's own tables."""
DOOR_S = 2.0
"""How long others wait for a suspect before their messages go back to the queue, for other workers to take."""
_LOOK_S = 0.2
_EXIT_MEMORY = 77
_PR_SET_PDEATHSIG = 1
_READY = b"ready"


class Room:
    """Many may be in it, or one alone. Who wants to be alone first lets everybody in who waits: neither starves."""

    def __init__(self, *, leaving: threading.Event) -> None:
        self._leaving = leaving
        self._changed = threading.Condition()
        self._inside = 0
        self._waiting = 0
        self._closed = False

    @contextmanager
    def shared(self) -> Iterator[bool]:
        """False when the door stayed closed for `DOOR_S`."""
        with self._changed:
            self._waiting += 1
            entered = self._changed.wait_for(lambda: not self._closed, DOOR_S)
            self._waiting -= 1
            self._inside += entered
            self._changed.notify_all()
        try:
            yield entered
        finally:
            with self._changed:
                self._inside -= entered
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Waits until the others are gone. False when the worker is leaving."""
        closed = False
        with self._changed:
            while not closed and not self._leaving.is_set():
                closed = self._changed.wait_for(lambda: not self._closed and not self._waiting, _LOOK_S)
            self._closed = closed or self._closed
            while closed and self._inside and not self._leaving.is_set():
                self._changed.wait(_LOOK_S)
            alone = closed and not self._inside
        try:
            yield alone
        finally:
            if closed:
                with self._changed:
                    self._closed = False
                    self._changed.notify_all()


class ChildDecoder:
    """`decode_image` in a child process of its own, with a deadline and a limit of memory."""

    def __init__(self, *, leaving: threading.Event, deadline_s: float) -> None:
        self._leaving = leaving
        self._deadline_s = deadline_s

    def __call__(
        self,
        data: bytes,
        *,
        limits: Limits,
        animation: Literal["first", "refuse"],
        begins: Callable[[], object],
    ) -> DecodedImage:
        """`begins` is called when the child is there and has not seen the bytes yet. Raises `ContentError` as decoding
        does, and `crashed_decoder`, `stalled`, `memory_exhausted`; `Fatal` when the child was killed; `Draining` when
        the worker is leaving; `TransientError` when no child can be had."""
        ours, theirs = multiprocessing.Pipe()
        spawn = multiprocessing.get_context("spawn")
        child = spawn.Process(target=_decode_here, args=(theirs, os.getpid(), limits, animation), daemon=True)
        child.start()
        theirs.close()
        try:
            with ours:
                return self._talk(ours, data, begins)
        except (EOFError, ConnectionError) as exc:
            child.join()
            raise _verdict(int(child.exitcode or 0)) from exc
        finally:
            child.kill()
            child.join()
            child.close()

    def _talk(self, child: Connection, data: bytes, begins: Callable[[], object]) -> DecodedImage:
        """What the child says is bytes and JSON, never pickle: it has read what strangers wrote."""
        try:
            self._await(child, START_S)
            child.recv_bytes(len(_READY))
        except (EOFError, ConnectionError, TimeoutError) as exc:
            raise TransientError("No process for decoding could be started; see the log.", code="internal") from exc
        begins()
        child.send_bytes(data)
        try:
            self._await(child, self._deadline_s)
        except TimeoutError as exc:
            text = f"Decoding it, alone and in a process of its own, was not done after {self._deadline_s:g} s."
            raise ContentError(text, code="stalled") from exc
        told = json.loads(child.recv_bytes())
        if "code" in told:
            raise ContentError(told["text"], code=told["code"])
        pixels = [np.frombuffer(child.recv_bytes(), np.uint8).reshape(shape).copy() for shape in told["shapes"]]
        credit = tuple((name, text) for name, text in told["credit"])
        return DecodedImage(pixels[0], pixels[1] if len(pixels) > 1 else None, tuple(told["notes"]), credit)

    def _await(self, child: Connection, within_s: float) -> None:
        deadline = time.monotonic() + within_s
        while not child.poll(_LOOK_S):
            if self._leaving.is_set():
                raise Draining
            if time.monotonic() > deadline:
                raise TimeoutError


def _verdict(code: int) -> ContentError | Fatal:
    """`code`: of a child that ended while it decoded; negative: the signal that ended it."""
    if code == _EXIT_MEMORY:
        return ContentError(
            "Decoding it takes more memory than any image of its size should: the file is damaged or malicious.",
            code="memory_exhausted",
        )
    if code == -signal.SIGKILL:
        return Fatal("The process that decoded it alone was killed, as the system does for memory.", code="killed")
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return ContentError(
        f"Decoding it, alone and in a process of its own, ended that process {how}: the file is damaged or malicious.",
        code="crashed_decoder",
    )


def _decode_here(parent: Connection, parent_id: int, limits: Limits, animation: Literal["first", "refuse"]) -> None:
    """The child."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_id:
        os._exit(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole group, it is our parent's business
    faulthandler.enable()
    parent.send_bytes(_READY)
    data = parent.recv_bytes()
    _limit_memory(limits)
    try:
        image = decode_image(data, limits=limits, animation=animation)
    except ContentError as exc:
        parent.send_bytes(json.dumps({"code": exc.code, "text": str(exc)}).encode())
        return
    except MemoryError:
        os._exit(_EXIT_MEMORY)
    planes = [image.rgb] if image.alpha is None else [image.rgb, image.alpha]
    told = {"shapes": [plane.shape for plane in planes], "notes": image.notes, "credit": image.credit}
    parent.send_bytes(json.dumps(told).encode())
    for plane in planes:
        parent.send_bytes(np.ascontiguousarray(plane).data.cast("B"))


def _limit_memory(limits: Limits) -> None:
    """Of private memory: what libraries map does not count."""
    status = Path("/proc/self/status").read_text()
    held = int(status.split("VmData:")[1].split()[0]) * 1024
    most = held + CHILD_BYTES + DECODE_BYTES_PER_PIXEL * limits.max_pixels
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
