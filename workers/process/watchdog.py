"""Ends a worker that makes no progress or takes too much memory; its supervisor starts another, and nothing is lost.

  the device is lost                          exit 70, at once
  an image computes for `STALL_S`            exit 72: it is blamed, all threads are shown in the log
  resident memory above the limit             it drains, exit 0
  a quarter above the limit                   exit 72, at once: what is being computed is blamed
  nothing of ours runs for `STALL_S`          exit 1, by faulthandler: a library keeps the interpreter lock
  a fault in native code                      its signal: what is being computed is blamed (`workers/process/crash_reporter.py`)

An image blamed by two processes becomes a suspect (`workers/process/isolation.py`); all others are given back.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jobs.ledger import Claim
from workers.models.batcher import Predictor
from workers.process.crash_attribution import Accused, Fatal
from workers.process.crash_reporter import LastWord
from workers.process.leases import Leases
from workers.process.memory import resident_bytes

log = logging.getLogger(__name__)

EXIT_DEVICE_LOST = 70
EXIT_STALLED = 72
STALL_S = 300.0
"""The slowest sound image, 100 MP with every rendition on loaded cores, computes for about a minute."""
GIVE_BACK_S = 10.0
"""For images that are being published when the process must end."""
HARD_SHARE = 1.25
_LOOK_S = 0.5
_MEMORY_LOOK_S = 0.05
"""A thread fills one or two gigabytes a second: looking less often, the kernel would be first, and say no name."""

Blame = Callable[[Fatal], object]


class Watchdog:
    """`watch` runs in a thread of its own and never returns but by ending the process."""

    def __init__(
        self,
        predictor: Predictor,
        leases: Leases,
        last_word: LastWord,
        *,
        draining: threading.Event,
        limit_bytes: int,
        stall_s: float = STALL_S,
    ) -> None:
        self.exit_code = 0
        self._predictor = predictor
        self._leases = leases
        self._last_word = last_word
        self._draining = draining
        self._limit_bytes = limit_bytes
        self._stall_s = stall_s
        self._computing: dict[str, tuple[float, Blame]] = {}
        self._recycling = False

    @contextmanager
    def computing(self, accused: Accused, blame: Blame) -> Iterator[None]:
        """The block computes: it waits for nobody but where `waiting` says so. `blame` records that the process ends,
        perhaps because of this image."""
        claim = accused.claim.token
        self._computing[claim] = time.monotonic(), blame
        try:
            with self._last_word.naming(accused):
                yield
        finally:
            self._computing.pop(claim, None)

    @contextmanager
    def waiting(self, claim: Claim) -> Iterator[None]:
        """Within `computing`: the block waits, under a deadline of its own."""
        _, blame = self._computing.pop(claim.token)
        yield
        self._computing[claim.token] = time.monotonic(), blame

    def watch(self) -> None:
        next_look = 0.0
        while True:
            if time.monotonic() >= next_look:
                self._last_word.expect_progress(self._stall_s)
                self._look_at_progress()
                next_look = time.monotonic() + _LOOK_S
            if self._predictor.lost.wait(_MEMORY_LOOK_S):
                log.error("the device is lost: this process ends, its supervisor starts another", extra=_ACTION)
                self._end(EXIT_DEVICE_LOST, within_s=GIVE_BACK_S)
            self._look_at_memory()

    def _look_at_progress(self) -> None:
        now = time.monotonic()
        stalled = [blame for since, blame in list(self._computing.values()) if now - since > self._stall_s]
        if stalled:
            log.critical("%d images make no progress: this process ends", len(stalled), extra=_ACTION)
            faulthandler.dump_traceback(all_threads=True)
            _blame(stalled, Fatal(f"It was not computed after {self._stall_s:g} s.", code="stalled"))
            self._end(EXIT_STALLED, within_s=GIVE_BACK_S, stuck=len(stalled))

    def _look_at_memory(self) -> None:
        resident = resident_bytes()
        if resident > HARD_SHARE * self._limit_bytes:
            log.critical("memory runs out (%.0f MB): this process ends", resident / 1e6, extra=_ACTION)
            everyone = [blame for _, blame in list(self._computing.values())]
            _blame(everyone, Fatal("The worker's memory ran out while it was computed.", code="memory_exhausted"))
            self._end(EXIT_STALLED, within_s=0)
        elif resident > self._limit_bytes and not self._recycling:
            self._recycling = True
            log.warning(
                "recycling: %.0f MB resident, the limit is %.0f MB (CUTFLEET_MEMORY_MB)",
                resident / 1e6,
                self._limit_bytes / 1e6,
                extra=_ACTION,
            )
            os.kill(os.getpid(), signal.SIGTERM)

    def _end(self, code: int, *, within_s: float, stuck: int = 0) -> None:
        """1. Nothing new starts. 2. What is being recorded or published may end. 3. The rest is given back."""
        self.exit_code = code
        self._draining.set()
        faulthandler.dump_traceback_later(3 * GIVE_BACK_S, exit=True)
        os.kill(os.getpid(), signal.SIGTERM)  # Celery takes nothing off the queues any more
        deadline = time.monotonic() + within_s
        while self._leases.in_flight() > stuck and time.monotonic() < deadline:
            time.sleep(_MEMORY_LOOK_S)
        threading.Timer(GIVE_BACK_S, os._exit, args=(code,)).start()  # Redis may be away too
        self._leases.release_all()
        logging.shutdown()
        os._exit(code)


def _blame(blamed: list[Blame], error: Fatal) -> None:
    for blame in blamed:
        try:
            blame(error)
        except Exception:
            log.exception("not blamed: it counts as of a worker that fell silent", extra=_ACTION)


_ACTION = {"action": "watchdog"}
