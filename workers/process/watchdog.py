"""End a worker that makes no progress or takes too much memory. Its supervisor starts another; no image is lost.

  the device is lost                               exit 70, at once
  an image computes for `STALL_S`                  exit 72; reported as its crash, with a traceback of all threads
  resident memory above the limit                  drain, exit 0
  a quarter above the limit                        exit 72, at once; reported as a crash of all images in work
  no Python code runs for `STALL_S`                exit 1, by faulthandler: a library keeps the interpreter lock
  a fault in native code                           its signal; reported by `workers/process/crash_reporter.py`

An image that is reported by two processes becomes a suspect (`workers/process/gate.py`). All others are released.
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

from jobs.ledger.window import Claim
from workers.models.batcher import STALL_S, Batcher
from workers.process.crash_attribution import FatalFault, InFlightImage
from workers.process.crash_reporter import CrashReporter
from workers.process.exit_codes import ExitCode
from workers.process.leases import Leases
from workers.process.memory import resident_bytes

log = logging.getLogger(__name__)

MEMORY_EXHAUSTED = FatalFault("The worker's memory ran out while it computed this image.", code="memory_exhausted")
RELEASE_S = 10.0
"""Time for images that are being published when the process must end."""
HARD_SHARE = 1.25
_CHECK_S = 0.5
_MEMORY_CHECK_S = 0.05
"""A thread fills one or two gigabytes a second: with a longer interval the OOM killer would fire before we could
attribute the failure."""

ReportCrash = Callable[[FatalFault], object]
"""Records that this process ends with a fault, perhaps because of one image."""


class Watchdog:
    """`run` takes a thread of its own, and returns only by ending the process. `exit_code`: why it ends the process; 0
    until then."""

    def __init__(
        self,
        batcher: Batcher,
        leases: Leases,
        crash_reporter: CrashReporter,
        *,
        draining: threading.Event,
        limit_bytes: int,
        stall_s: float = STALL_S,
    ) -> None:
        self.exit_code = 0
        self.limit_bytes = limit_bytes
        self._batcher = batcher
        self._leases = leases
        self._crash_reporter = crash_reporter
        self._draining = draining
        self._stall_s = stall_s
        self._computing: dict[str, tuple[float, ReportCrash]] = {}
        self._recycling = False

    @contextmanager
    def computing(self, image: InFlightImage, report_crash: ReportCrash) -> Iterator[None]:
        """Watch the block for a stall. It must not wait for anything, except within `waiting`."""
        token = image.claim.token
        self._computing[token] = time.monotonic(), report_crash
        try:
            with self._crash_reporter.tracking(image):
                yield
        finally:
            self._computing.pop(token, None)

    @contextmanager
    def waiting(self, claim: Claim) -> Iterator[None]:
        """Within `computing`: the block waits, under a deadline of its own."""
        _, report_crash = self._computing.pop(claim.token)
        yield
        self._computing[claim.token] = time.monotonic(), report_crash

    def run(self) -> None:
        next_check = 0.0
        while True:
            if time.monotonic() >= next_check:
                self._crash_reporter.expect_progress(self._stall_s)
                self._check_progress()
                next_check = time.monotonic() + _CHECK_S
            if self._batcher.lost.wait(_MEMORY_CHECK_S):
                log.error("the device is lost: this process ends, its supervisor starts another", extra=_ACTION)
                self._end(ExitCode.DEVICE_LOST, within_s=RELEASE_S)
            self._check_memory()

    def _check_progress(self) -> None:
        now = time.monotonic()
        stalled = [report for since, report in list(self._computing.values()) if now - since > self._stall_s]
        if stalled:
            log.critical("%d images make no progress: this process ends", len(stalled), extra=_ACTION)
            faulthandler.dump_traceback(all_threads=True)
            fault = FatalFault(f"Computing this image did not finish within {self._stall_s:g} s.", code="stalled")
            _report_all(stalled, fault)
            self._end(ExitCode.STALLED, within_s=RELEASE_S, stuck=len(stalled))

    def _check_memory(self) -> None:
        resident = resident_bytes()
        if resident > HARD_SHARE * self.limit_bytes:
            log.critical("memory runs out (%.0f MB): this process ends", resident / 1e6, extra=_ACTION)
            _report_all([report for _, report in list(self._computing.values())], MEMORY_EXHAUSTED)
            self._end(ExitCode.STALLED, within_s=0)
        elif resident > self.limit_bytes and not self._recycling:
            self._recycling = True
            log.warning(
                "recycling: %.0f MB resident, the limit is %.0f MB (CUTFLEET_MEMORY_MB)",
                resident / 1e6,
                self.limit_bytes / 1e6,
                extra=_ACTION,
            )
            os.kill(os.getpid(), signal.SIGTERM)

    def _end(self, code: ExitCode, *, within_s: float, stuck: int = 0) -> None:
        """1. No new image starts. 2. Images other than `stuck` may finish `within_s`. 3. The rest is released."""
        self.exit_code = code
        self._draining.set()
        faulthandler.dump_traceback_later(3 * RELEASE_S, exit=True)
        os.kill(os.getpid(), signal.SIGTERM)  # Celery stops consuming
        deadline = time.monotonic() + within_s
        while self._leases.in_flight() > stuck and time.monotonic() < deadline:
            time.sleep(_MEMORY_CHECK_S)
        threading.Timer(RELEASE_S, os._exit, args=(code,)).start()  # Redis may be unavailable too
        self._leases.release_all()
        logging.shutdown()
        os._exit(code)


def _report_all(reports: list[ReportCrash], fault: FatalFault) -> None:
    for report in reports:
        try:
            report(fault)
        except Exception:
            log.exception("crash not reported: for the ledger the worker was killed", extra=_ACTION)


_ACTION = {"action": "watchdog"}
