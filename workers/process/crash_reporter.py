"""Report a worker that dies of a fault in native code (SIGSEGV, SIGBUS, SIGABRT, SIGFPE, SIGILL) or of a library that
keeps the interpreter lock. A listener process records in the ledger which images the worker was computing.

faulthandler writes its report to a socket with hardly any buffer, so the dying process blocks until the listener has
read it all. The listener reads the rest only after the ledger has the report: in a container, all processes end with
the first, and the listener with them.

A process that is killed (SIGKILL, by a person or by the OOM killer) writes nothing: the socket closes and the listener
reports no image. Without the listener, or while Redis is unavailable for `REPORT_S`, a fault counts as such a kill.
"""

from __future__ import annotations

import faulthandler
import logging
import mmap
import os
import signal
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from jobs.errors import ServiceUnavailable
from jobs.ledger import Ledger
from jobs.settings import Settings
from workers.process.crash_attribution import FatalFault, InFlightImage
from workers.process.task_outcome import TaskOutcome

log = logging.getLogger(__name__)

NATIVE_FAULT = FatalFault(
    "A fault in native code ended the worker while it computed this image; the worker's log has the traceback.",
    code="crashed_worker",
)
INTERPRETER_LOCKED = FatalFault(
    "A library kept the interpreter lock while the worker computed this image; the worker's log has the traceback.",
    code="stalled",
)
REPORT_S = 10.0
"""Longest wait for Redis after a crash."""
_FIRST_WORDS = {b"Fatal Python error: ": NATIVE_FAULT, b"Timeout (": INTERPRETER_LOCKED}
"""How a report of faulthandler begins."""
_SLOTS, _SLOT_BYTES = 1024, 4096
_LENGTH = struct.Struct("I")
_RETRY_S = 0.2


class CrashReporter:
    """Forks the listener: create it before torch is imported and before any thread starts."""

    def __init__(self, settings: Settings) -> None:
        self._images = _ImageTable()
        self._socket, listener_end = socket.socketpair()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        with listener_end:
            if os.fork() == 0:
                self._socket.close()
                _listen(listener_end, self._images, settings)
        faulthandler.enable(self._socket)

    @contextmanager
    def tracking(self, image: InFlightImage) -> Iterator[None]:
        """A fault within the block is reported for this image, and for all others tracked then."""
        slot = self._images.add(image)
        try:
            yield
        finally:
            self._images.remove(slot)

    def expect_progress(self, within_s: float) -> None:
        """End the process with exit code 1, and report it, unless this is called again within `within_s`."""
        faulthandler.dump_traceback_later(within_s, exit=True, file=self._socket)


class _ImageTable:
    """The images that the worker computes, in memory that it shares with the listener. Each slot: length, JSON."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _SLOTS * _SLOT_BYTES)
        self._free = deque(range(_SLOTS))

    def add(self, image: InFlightImage) -> int:
        """Return the slot. An image too long for it is not written: a crash counts as a kill then."""
        slot = self._free.popleft()
        text, start = image.to_json().encode(), slot * _SLOT_BYTES
        if len(text) <= _SLOT_BYTES - _LENGTH.size:
            self._memory[start + _LENGTH.size : start + _LENGTH.size + len(text)] = text
            _LENGTH.pack_into(self._memory, start, len(text))
        return slot

    def remove(self, slot: int) -> None:
        _LENGTH.pack_into(self._memory, slot * _SLOT_BYTES, 0)
        self._free.append(slot)

    def read(self) -> list[InFlightImage]:
        """Return all images. Skips one that was just being written: it is not computed yet."""
        images = []
        for start in range(0, len(self._memory), _SLOT_BYTES):
            (length,) = _LENGTH.unpack_from(self._memory, start)
            if not length:
                continue
            text = self._memory[start + _LENGTH.size : start + _LENGTH.size + length]
            try:
                images.append(InFlightImage.from_json(text.decode()))
            except ValueError:
                continue
        return images


def _listen(worker: socket.socket, images: _ImageTable, settings: Settings) -> None:
    """Main function of the listener. It ignores signals to the process group, and ends after the worker."""
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        received = b""
        while b"\n" not in received and (more := worker.recv(_SLOT_BYTES)):
            received += more
        for words, fault in _FIRST_WORDS.items():
            if received.startswith(words):
                _report_all(images.read(), fault, settings)
        while received:
            sys.stderr.buffer.write(received)
            received = worker.recv(_SLOT_BYTES)
        sys.stderr.flush()
    except Exception:
        log.exception("a worker's crash was not reported", extra=_ACTION)
    finally:
        os._exit(0)


def _report_all(images: list[InFlightImage], fault: FatalFault, settings: Settings) -> None:
    log.critical("%s Images in work: %d.", fault, len(images), extra=_ACTION)
    deadline = time.monotonic() + REPORT_S
    with Ledger(settings.redis_url, name=settings.redis_name) as ledger:
        for image in images:
            outcome = _report(image, fault, ledger, deadline)
            fields = {"image": image.claim.image, "key": image.key, "code": fault.code}
            log.warning("%s: %s", outcome, fault, extra=_ACTION | fields)


def _report(image: InFlightImage, fault: FatalFault, ledger: Ledger, deadline: float) -> TaskOutcome:
    while True:
        try:
            return image.report(fault, ledger)
        except ServiceUnavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(_RETRY_S)


_ACTION = {"action": "crash report"}
