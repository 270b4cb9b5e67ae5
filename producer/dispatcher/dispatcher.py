"""The dispatcher: the piece that Celery lacks. Every second it feeds the queues within a window, publishes again what
has passed its deadline, releases due retries and closes jobs whose images are all final.

One is active, by a lock that it renews; others stand by. Each of its moves carries the lock's fencing token, so that
one that was frozen and wakes changes nothing. Killed at any line, the next one goes on from the ledger.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence

from jobs.broker import lane_queue
from jobs.errors import CutfleetError, OutputError, ServiceUnavailable, TransientError
from jobs.job import Job
from jobs.ledger import Ledger
from jobs.ledger.connection import Fenced
from jobs.liveness import AliveFile
from jobs.message import LANES
from jobs.s3.client import Store, destination_prefix
from jobs.settings import Settings
from producer.dispatcher.feeder import Feeder
from producer.dispatcher.job_backoff import HeldUp
from producer.dispatcher.metrics import DispatcherMetrics
from producer.records.failures import MAX_HELD, spill
from producer.records.manifest import PART_ROWS, record_live, rows_lost
from producer.records.report import write_report

log = logging.getLogger(__name__)

LOCK_S = 10
PAUSE_S = 1.0
JUDGED_FROM = 100
"""Images of a job that must be final before their failures say anything about the rest."""
CANCELS_A_TURN = 128
"""Moves, each of `CANCEL_ROWS` images: two million images, in a tenth of a second."""
SMALL_JOB = 2 * PART_ROWS
SMALL_REPORTS = 4
"""Reports of small jobs that are written at once, and beside that of a large one, which takes minutes."""
FEEDING_PAUSE_S = 0.1
"""While images are fed: a fast GPU empties its share of the window in less than a second."""
DAY_S = 86_400


def _clock() -> float:
    """Seconds. It goes on while the machine is suspended, as leases do."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Dispatcher:
    """`run` until `stop` is set; `step` once. Not safe for threads; many processes may each run one."""

    def __init__(self, ledger: Ledger, store: Store, settings: Settings) -> None:
        self.metrics = DispatcherMetrics()
        self.metrics.listen(ledger=ledger, store=store)
        self._ledger = ledger
        self._store = store
        self._settings = settings
        self._lease_s = settings.lease_s
        self._failed_share = settings.max_failed_share
        self._keep_s = settings.keep_days * 86_400
        self._me = uuid.uuid4().hex
        self._held_up = HeldUp()
        self._feeder = Feeder(ledger, store, lease_s=settings.lease_s, held_up=self._held_up)
        self._reports: dict[str, _Report] = {}
        self._writer = concurrent.futures.ThreadPoolExecutor(SMALL_REPORTS, "report")
        self._writer_of_large = concurrent.futures.ThreadPoolExecutor(1, "large-report")
        self._closing = threading.Event()
        self._quiet_until = 0.0
        self._epoch: int | None = None
        self._alive = AliveFile(settings.alive_file)

    def run(self, stop: threading.Event) -> None:
        """Goes on whatever happens to Redis and S3: the cause is logged once, and once more when it has gone."""
        failing = ""
        while not stop.is_set():
            busy = False
            self._alive.touch()
            try:
                busy = self.step()
                if failing:
                    log.info("well again", extra={"action": "dispatch"})
                failing = ""
            except Fenced:
                self._stand_by()
            except CutfleetError as exc:
                if exc.code.startswith("redis_") and exc.code != "redis_full":
                    self._quiet_until = _clock() + self._lease_s  # leases could not be renewed meanwhile
                if exc.code != failing:
                    log.error(str(exc), extra={"action": "dispatch", "code": exc.code})
                failing = exc.code
            self._pause(FEEDING_PAUSE_S if busy else PAUSE_S, stop)
        self.close()

    def _pause(self, seconds: float, stop: threading.Event) -> None:
        began = _clock()
        stop.wait(seconds)
        self._mind_standstill(_clock() - began - seconds)

    def _mind_standstill(self, late_s: float) -> None:
        """What lasts much longer than it should is a machine that stood still: its workers could not renew leases
        either."""
        if late_s > self._lease_s / 2:
            self._quiet_until = _clock() + self._lease_s

    def step(self) -> bool:
        """One turn. True when images were fed: there may soon be room again."""
        began = _clock()
        epoch = self._ledger.lead(self._me, ttl_s=LOCK_S)
        if epoch is None:
            self._stand_by()
            return False
        if epoch != self._epoch:
            self._become_active(epoch)
        full = self._why_full(epoch)
        jobs = self._ledger.open_jobs()
        self._mind_standstill(_clock() - began)
        busy = False if full else self._publish(epoch, jobs)
        busy = self._each(jobs, lambda job: self._attend(epoch, job)) or busy
        self.metrics.survey(self._ledger, jobs)
        if full:
            raise full
        return busy

    def _why_full(self, epoch: int) -> CutfleetError | None:
        """Redis refuses what makes it grow: nothing is published then, all that ends goes on."""
        try:
            self._ledger.check_room(epoch)
        except ServiceUnavailable as exc:
            if exc.code != "redis_full":
                raise
            return exc
        return None

    def _publish(self, epoch: int, jobs: Sequence[Job]) -> bool:
        """Whatever goes on a queue. True when images were fed."""
        self._ledger.retry_due(epoch, lease_s=self._lease_s)
        if _clock() >= self._quiet_until:
            self._reconcile(epoch)
        return self._feeder.feed(epoch, jobs)

    def close(self) -> None:
        """Gives the lock back, so that another need not wait for it."""
        self._closing.set()  # a report under way ends before its next part
        for writer in (self._writer, self._writer_of_large):
            writer.shutdown(wait=True, cancel_futures=True)
        try:
            self._ledger.resign(self._me)
        except CutfleetError as exc:
            log.warning("The lock was not given back: %s", exc, extra={"action": "dispatch"})

    def _become_active(self, epoch: int) -> None:
        self._epoch = epoch
        self._reports.clear()
        log.info("active", extra={"action": "dispatch", "epoch": epoch})
        since_restart = self._ledger.uptime_s()
        if since_restart < self._lease_s:
            self._quiet_until = max(self._quiet_until, _clock() + self._lease_s - since_restart)

    def _stand_by(self) -> None:
        if self._epoch is not None:
            log.info("standing by: another dispatcher is active", extra={"action": "dispatch"})
        self._epoch = None
        self._reports.clear()
        self.metrics.stand_by()
        self._feeder.forget()

    def _reconcile(self, epoch: int) -> None:
        for image in self._ledger.reclaim(epoch, lease_s=self._lease_s):
            self.metrics.reclaimed.inc()
            log.warning("worker fell silent: published again", extra={"action": "reclaim", "image": image})
        overdue = self._ledger.overdue(epoch)
        if not overdue:
            return
        # of both lanes: a job that was tuned has messages on its old one
        queues = {lane_queue(lane, job.model) for job in self._ledger.open_jobs() for lane in (*LANES, "suspect")}
        present = self._ledger.images_with_message(queues)
        lost = self._ledger.look_again(epoch, {image: image in present for image in overdue}, lease_s=self._lease_s)
        if lost:
            self.metrics.republished.inc(lost)
            log.warning("messages were lost: published again", extra={"action": "reconcile", "images": lost})

    def _each(self, jobs: Sequence[Job], do: Callable[[Job], bool]) -> bool:
        """What fails holds up its own job only; it is tried again soon. True when there is more to do."""
        away: CutfleetError | None = None
        more = False
        for job in jobs:
            try:
                more = do(job) or more
            except Fenced:
                raise
            except CutfleetError as exc:
                if exc.code.startswith("redis_"):
                    away = exc
                else:
                    self._held_up.note(job, exc, undone="closed")
            except Exception as exc:
                self._held_up.note(job, exc, undone="closed")
        self._held_up.keep(jobs)
        if away is not None:
            raise away
        return more

    def _attend(self, epoch: int, job: Job) -> bool:
        """What a job needs beside being fed. True when there is more to do at once."""
        more = self._cancel_rest(epoch, job) if job.cancelled else self._look_at_failures(epoch, job)
        if not self._held_up.waits(job):
            self._tend_live(epoch, job)
            self._close_if_final(epoch, job)
        return more

    def _look_at_failures(self, epoch: int, job: Job) -> bool:
        if job.paused is None and fails_too_much(job, self._failed_share):
            reason = f"too_many_failures: `cutfleet dead {job.id}` says why, `cutfleet unpause {job.id}` goes on"
            log.error("paused: %s", reason, extra={"action": "feed", "job": job.id, "failed": job.failed})
            self._ledger.hold(epoch, job.id, reason)
        return (
            job.failed > MAX_HELD
            and not self._held_up.waits(job)
            and spill(epoch, job, ledger=self._ledger, store=self._store)
        )

    def _cancel_rest(self, epoch: int, job: Job) -> bool:
        """Of a cancelled job, what no worker holds is final: millions in a turn. True when there is more to do. What
        workers held ends as they say, or when they give it back."""
        cursor = job.cancel_cursor
        if cursor >= job.total:
            return False
        held = self._ledger.cancel_fed(epoch, job.id)
        for _ in range(CANCELS_A_TURN):
            came = self._ledger.cancel_rest(epoch, job.id, cursor, held)
            if came is None or came >= job.total:
                return False
            cursor = came
        return True

    def _tend_live(self, epoch: int, job: Job) -> None:
        """Ends the job of a watch with its day, and takes a live job's full parts out of the ledger."""
        if job.watch and not job.listed and (job.cancelled or job.created // DAY_S < time.time() // DAY_S):
            self._ledger.finish_listing(job.id)
        if job.unrecorded >= PART_ROWS:
            record_live(job, epoch=epoch, store=self._store, ledger=self._ledger)

    def _close_if_final(self, epoch: int, job: Job) -> None:
        """Writes the report beside the loop, then closes. A dispatcher that dies in between: the next writes it
        again."""
        report = self._reports.get(job.id)
        if not job.listed or job.open:
            if report is not None:
                report.is_outdated = True  # it was opened again; two are never written at once
            return
        if report is None:
            writer = self._writer if job.total <= SMALL_JOB else self._writer_of_large
            self._reports[job.id] = _Report(writer.submit(self._record_and_report, epoch, job))
            return
        if not report.writing.done():
            return
        del self._reports[job.id]
        if report.is_outdated:
            return
        report.writing.result()
        if self._ledger.close_job(epoch, job.id, keep_s=self._keep_s):
            log.info("closed", extra={"action": "close", "job": job.id, "done": job.done, "failed": job.failed})

    def _record_and_report(self, epoch: int, job: Job) -> None:
        """A job that was cancelled since nobody may write to its destination closes without a report."""
        try:
            self._store.check(destination_prefix(job.destination), "output")
        except OutputError as exc:
            if not job.cancelled:
                raise
            log.warning("closed without a report: %s", exc, extra={"action": "close", "job": job.id, "code": exc.code})
            return

        def check() -> None:
            if self._closing.is_set():
                raise Fenced("This dispatcher is going down.")
            self._ledger.check_leads(epoch)
            if self._ledger.job(job.id).open:
                raise TransientError(f"Job {job.id} was opened again.", code="job_reopened")

        while (job := self._ledger.job(job.id)).unrecorded:
            check()
            recorded = record_live(job, epoch=epoch, store=self._store, ledger=self._ledger)
            if not recorded and self._ledger.job(job.id).parts == job.parts:
                raise rows_lost(job)
        write_report(job, self._settings, ledger=self._ledger, store=self._store, check=check)


@dataclasses.dataclass
class _Report:
    writing: concurrent.futures.Future[None]
    is_outdated: bool = False


def fails_too_much(job: Job, share: float) -> bool:
    """Of what became final since a person last looked. A job that is fed to its end has nothing left to save."""
    final, failed = job.final - job.judged_final, job.failed - job.judged_failed
    return final >= JUDGED_FROM and failed > share * final and (job.cursor < job.total or not job.listed)
