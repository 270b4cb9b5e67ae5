"""Closes jobs: writes the report of a job whose images are all final, in threads beside the dispatcher's loop, then
closes the job. A dispatcher that takes over in between writes the report again."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import threading
from collections.abc import Callable

from jobs.errors import OutputError, TransientError
from jobs.job import Job
from jobs.ledger import Ledger
from jobs.ledger.connection import Fenced
from jobs.s3.client import Store
from jobs.settings import Settings
from producer.records.manifest import PART_ROWS, record_live, rows_lost
from producer.records.report import write_report

log = logging.getLogger(__name__)

SMALL_JOB = 2 * PART_ROWS
"""Images. Reports of larger jobs take minutes; small ones do not wait for them."""
SMALL_REPORTS = 4
"""Reports of small jobs that are written in parallel, beside one of a large job."""


@dataclasses.dataclass
class _Report:
    """A report in work. `is_outdated`: its job was reopened. Two reports of a job are never written in parallel."""

    writing: concurrent.futures.Future[None]
    is_outdated: bool = False


class JobCloser:
    """Belongs to one dispatcher; not safe for threads."""

    def __init__(self, ledger: Ledger, store: Store, settings: Settings) -> None:
        self._ledger = ledger
        self._store = store
        self._settings = settings
        self._keep_s = settings.keep_days * 86_400
        self._reports: dict[str, _Report] = {}
        self._small = concurrent.futures.ThreadPoolExecutor(SMALL_REPORTS, "report")
        self._large = concurrent.futures.ThreadPoolExecutor(1, "large-report")
        self._stopping = threading.Event()

    def close_if_final(self, epoch: int, job: Job) -> None:
        """Start the report of a final job; close the job once its report is written. Raises the report's error."""
        report = self._reports.get(job.id)
        if not job.listed or job.open:
            if report is not None:
                report.is_outdated = True
        elif report is None:
            pool = self._small if job.total <= SMALL_JOB else self._large
            self._reports[job.id] = _Report(pool.submit(self._write_report, epoch, job))
        elif report.writing.done():
            del self._reports[job.id]
            if not report.is_outdated:
                report.writing.result()
                if self._ledger.dispatch.close(epoch, job.id, keep_s=self._keep_s):
                    log.info("closed", extra={"action": "close", "job": job.id, "done": job.done, "failed": job.failed})

    def reset(self) -> None:
        """Forget the reports in work: each of them ends by itself, at its next check of the lock."""
        self._reports.clear()

    def stop(self) -> None:
        """End the reports in work before their next file."""
        self._stopping.set()
        for pool in (self._small, self._large):
            pool.shutdown(wait=True, cancel_futures=True)

    def _write_report(self, epoch: int, job: Job) -> None:
        """A cancelled job whose destination is not allowed any more gets no report: else it would never close."""
        try:
            self._store.check_allowed(job.destination, "output")
        except OutputError as exc:
            if not job.cancelled:
                raise
            log.warning("closed without a report: %s", exc, extra={"action": "close", "job": job.id, "code": exc.code})
            return

        def check() -> None:
            self._check_still_final(epoch, job.id)

        recorded = self._record_rows(epoch, job.id, check)
        write_report(recorded, self._settings, ledger=self._ledger, store=self._store, check=check)

    def _check_still_final(self, epoch: int, job_id: str) -> None:
        """Raises `Fenced` when this dispatcher stops or another one is active, `TransientError` when the job was
        reopened."""
        if self._stopping.is_set():
            raise Fenced("This dispatcher is stopping.")
        self._ledger.dispatch.check_lock(epoch)
        if self._ledger.jobs.get(job_id).open:
            raise TransientError(f"Job {job_id} was reopened.", code="job_reopened")

    def _record_rows(self, epoch: int, job_id: str, check: Callable[[], None]) -> Job:
        """Record all rows of a live job in its manifest; return the job. Raises `OutputError` when rows are lost."""
        while (job := self._ledger.jobs.get(job_id)).unrecorded:
            check()
            recorded = record_live(job, epoch=epoch, store=self._store, ledger=self._ledger)
            if not recorded and self._ledger.jobs.get(job_id).parts == job.parts:
                raise rows_lost(job)
        return job
