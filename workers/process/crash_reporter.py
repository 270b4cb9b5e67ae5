"""What a worker says as it dies of a fault in native code (SIGSEGV, SIGBUS, SIGABRT, SIGFPE, SIGILL, or the interpreter
kept locked), and who hears it: a process beside it, that tells the ledger at once which images it was computing.

faulthandler speaks, on a socket that holds next to nothing, and waits until it was heard: the dying process stays until
the ledger knows. In a container, whose processes all end with the first, nobody would be left to tell it.

Who is killed (SIGKILL: by somebody, or by the kernel for memory) says nothing: the line just ends, and nobody is
blamed. Without the listener, or without Redis for `TELL_S`, a fault counts as such a silent death, too.
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
from workers.process.crash_attribution import Accused, Fatal

log = logging.getLogger(__name__)

FAULT = Fatal(
    "A fault in native code ended the worker while it was computed; its log shows where.", code="crashed_worker"
)
LOCKED = Fatal("A library stopped the worker while it was computed; its log shows where.", code="stalled")
TELL_S = 10.0
"""How long Redis may be away when a worker dies."""
_WORDS = {b"Fatal Python error: ": FAULT, b"Timeout (": LOCKED}
"""How faulthandler begins."""
_SEATS, _SEAT_BYTES = 1024, 4096
_LENGTH = struct.Struct("I")
_RETRY_S = 0.2


class LastWord:
    """Made before torch is imported and before there is any thread: it forks."""

    def __init__(self, settings: Settings) -> None:
        self._hands = mmap.mmap(-1, _SEATS * _SEAT_BYTES)  # shared with the listener
        self._free = deque(range(_SEATS))
        self._line, theirs = socket.socketpair()
        self._line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        with theirs:
            if os.fork() == 0:
                self._line.close()
                _listen(theirs, self._hands, settings)
        faulthandler.enable(self._line)

    @contextmanager
    def naming(self, accused: Accused) -> Iterator[None]:
        """Whoever hears of a fault within the block blames this image, with others perhaps."""
        seat = self._free.popleft()
        _write(self._hands, seat, accused)
        try:
            yield
        finally:
            _LENGTH.pack_into(self._hands, seat * _SEAT_BYTES, 0)
            self._free.append(seat)

    def expect_progress(self, within_s: float) -> None:
        """Ends the process with exit code 1, and a word, unless it is called again before that."""
        faulthandler.dump_traceback_later(within_s, exit=True, file=self._line)


def _write(hands: mmap.mmap, seat: int, accused: Accused) -> None:
    """One that is too long for its seat is not written: its worker's death is a silent one."""
    told, at = accused.to_json().encode(), seat * _SEAT_BYTES
    if len(told) <= _SEAT_BYTES - _LENGTH.size:
        hands[at + _LENGTH.size : at + _LENGTH.size + len(told)] = told
        _LENGTH.pack_into(hands, at, len(told))


def _read(hands: mmap.mmap) -> list[Accused]:
    found = []
    for at in range(0, len(hands), _SEAT_BYTES):
        (length,) = _LENGTH.unpack_from(hands, at)
        try:
            found += (
                [Accused.from_json(hands[at + _LENGTH.size : at + _LENGTH.size + length].decode())] if length else []
            )
        except ValueError:  # just being written: not computed yet
            continue
    return found


def _listen(line: socket.socket, hands: mmap.mmap, settings: Settings) -> None:
    """The listener's whole life. It ends after the worker, whoever is told to go."""
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        heard = b""
        while b"\n" not in heard and (more := line.recv(_SEAT_BYTES)):
            heard += more
        for word, error in _WORDS.items():
            if heard.startswith(word):
                _tell(_read(hands), error, settings)
        while heard:
            sys.stderr.buffer.write(heard)
            heard = line.recv(_SEAT_BYTES)
        sys.stderr.flush()
    except Exception:
        log.exception("a worker's last word was not heard", extra=_ACTION)
    finally:
        os._exit(0)


def _tell(blamed: list[Accused], error: Fatal, settings: Settings) -> None:
    log.critical("%s Blamed: %d images", error, len(blamed), extra=_ACTION)
    deadline = time.monotonic() + TELL_S
    with Ledger(settings.redis_url, name=settings.redis_name) as ledger:
        for accused in blamed:
            outcome = _blame(accused, error, ledger, deadline)
            facts = {"image": accused.claim.image, "key": accused.key, "code": error.code}
            log.warning("%s: %s", outcome, error, extra=_ACTION | facts)


def _blame(accused: Accused, error: Fatal, ledger: Ledger, deadline: float) -> str:
    while True:
        try:
            return accused.blame(error, ledger)
        except ServiceUnavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(_RETRY_S)


_ACTION = {"action": "last word"}
