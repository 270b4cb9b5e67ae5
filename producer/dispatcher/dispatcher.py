"""The dispatcher: feeds the queues, publishes again what was lost, releases due retries, pauses jobs with too many
failures, and closes jobs, in one turn a second.

One dispatcher is active, by a lock that it renews; others stand by. Each script checks the lock's fencing token, so a
dispatcher that lost the lock while it was frozen changes nothing. It may be killed at any line: the next one continues
from the ledger.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence

from jobs.errors import CutfleetError, RedisFull, RedisUnavailable
from jobs.job import Job
from jobs.ledger import Ledger
from jobs.ledger.connection import Fenced
from jobs.liveness import LivenessFile
from jobs.logs import RepeatedErrors
from jobs.message import QUEUE_LANES, queue_name
from jobs.s3.client import Store
from jobs.settings import Settings
from producer.dispatcher.closing import JobCloser
from producer.dispatcher.feeder import Feeder
from producer.dispatcher.job_backoff import JobBackoff
from producer.dispatcher.metrics import DispatcherMetrics
from producer.records.failures import MAX_HELD, spill
from producer.records.manifest import PART_ROWS, record_live

log = logging.getLogger(__name__)

LOCK_S = 10
TURN_S = 1.0
BUSY_TURN_S = 0.1
"""Pause after a turn that fed images: a fast GPU empties its share of the window in less than a second."""
MIN_FINAL = 100
"""Images of a job that must be final before its share of failures counts."""
CANCELS_PER_TURN = 128
"""Scripts, each of `CANCEL_ROWS` images: two million images, in a tenth of a second."""
DAY_S = 86_400


def boot_time() -> float:
    """Return seconds since boot. Includes the time while the machine is suspended, as leases do."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Dispatcher:
    """Not safe for threads; many processes may each run one."""

    def __init__(
        self, ledger: Ledger, store: Store, settings: Settings, *, clock: Callable[[], float] = boot_time
    ) -> None:
        self.metrics = DispatcherMetrics()
        self.metrics.count_requests(ledger=ledger, store=store)
        self._ledger = ledger
        self._store = store
        self._lease_s = settings.lease_s
        self._max_failed_share = settings.max_failed_share
        self._clock = clock
        self._id = uuid.uuid4().hex
        self._epoch: int | None = None
        self._alive = LivenessFile(settings.alive_file)
        self._backoff = JobBackoff()
        self._feeder = Feeder(ledger, store, lease_s=settings.lease_s, backoff=self._backoff)
        self._reconciler = _Reconciler(ledger, self.metrics, lease_s=settings.lease_s, clock=clock)
        self._closer = JobCloser(ledger, store, settings)

    def run(self, stop: threading.Event) -> None:
        """Take turns until `stop` is set, through outages of Redis and S3; then release the lock."""
        errors = RepeatedErrors(log, action="dispatch")
        while not stop.is_set():
            self._alive.touch()
            has_more = self._try_step(errors)
            self._pause(BUSY_TURN_S if has_more else TURN_S, stop)
        self.close()

    def step(self) -> bool:
        """Take one turn. Return whether another is worth taking at once. Raises `RedisFull` after a turn that published
        nothing."""
        began = self._clock()
        epoch = self._ledger.dispatch.lead(self._id, ttl_s=LOCK_S)
        if epoch is None:
            self._stand_by()
            return False
        if epoch != self._epoch:
            self._become_active(epoch)
        full = self._check_full(epoch)
        jobs = self._ledger.jobs.open()
        self._reconciler.pause_after_delay(self._clock() - began)
        has_more = False
        if full is None:
            self._ledger.dispatch.release_retries(epoch, lease_s=self._lease_s)
            self._reconciler.reconcile(epoch)
            has_more = self._feeder.feed(epoch, jobs)
        has_more = self._attend_each(epoch, jobs) or has_more
        self.metrics.survey(self._ledger, jobs)
        if full is not None:
            raise full
        return has_more

    def close(self) -> None:
        """Stop writing reports; release the lock, so that a standby need not wait for it to expire."""
        self._closer.stop()
        try:
            self._ledger.dispatch.resign(self._id)
        except CutfleetError as exc:
            log.warning("lock not released: %s", exc, extra={"action": "dispatch"})

    def _try_step(self, errors: RepeatedErrors) -> bool:
        try:
            has_more = self.step()
        except Fenced:
            self._stand_by()
            return False
        except CutfleetError as exc:
            if isinstance(exc, RedisUnavailable) and not isinstance(exc, RedisFull):
                self._reconciler.pause()
            errors.log(exc)
            return False
        if errors.clear():
            log.info("recovered", extra={"action": "dispatch"})
        return has_more

    def _pause(self, seconds: float, stop: threading.Event) -> None:
        began = self._clock()
        stop.wait(seconds)
        self._reconciler.pause_after_delay(self._clock() - began - seconds)

    def _become_active(self, epoch: int) -> None:
        self._epoch = epoch
        self._closer.reset()
        log.info("active", extra={"action": "dispatch", "epoch": epoch})
        self._reconciler.pause(elapsed_s=self._ledger.uptime_s())

    def _stand_by(self) -> None:
        if self._epoch is not None:
            log.info("standing by: another dispatcher is active", extra={"action": "dispatch"})
        self._epoch = None
        self._closer.reset()
        self._feeder.reset()
        self.metrics.stand_by()

    def _check_full(self, epoch: int) -> RedisFull | None:
        """Return the error of a full Redis: it takes no new message, but scripts that free memory still run."""
        try:
            self._ledger.dispatch.check_not_full(epoch)
        except RedisFull as exc:
            return exc
        return None

    def _attend_each(self, epoch: int, jobs: Sequence[Job]) -> bool:
        """Do what each job needs beside feeding; return whether there is more to do. An error delays only its own
        job."""
        redis_error: RedisUnavailable | None = None
        has_more = False
        for job in jobs:
            try:
                has_more = self._attend(epoch, job) or has_more
            except Fenced:
                raise
            except RedisUnavailable as exc:
                redis_error = exc
            except Exception as exc:
                self._backoff.start(job, exc, failed_step="close")
        self._backoff.keep(jobs)
        if redis_error is not None:
            raise redis_error
        return has_more

    def _attend(self, epoch: int, job: Job) -> bool:
        """Return whether there is more to do at once."""
        if job.cancelled:
            has_more = self._cancel_images(epoch, job)
        else:
            self._pause_failing(epoch, job)
            may_spill = job.failed > MAX_HELD and not self._backoff.is_active(job)
            has_more = may_spill and spill(epoch, job, ledger=self._ledger, store=self._store)
        if not self._backoff.is_active(job):
            if job.watch and not job.listed and (job.cancelled or job.created // DAY_S < time.time() // DAY_S):
                self._ledger.jobs.finish_listing(job.id)  # a watch has one job a day
            if job.unrecorded >= PART_ROWS:
                record_live(job, epoch=epoch, store=self._store, ledger=self._ledger)
            self._closer.close_if_final(epoch, job)
        return has_more

    def _cancel_images(self, epoch: int, job: Job) -> bool:
        """Make the images of a cancelled job final, except leased ones: those end with their worker. Return whether any
        are left."""
        cursor = job.cancel_cursor
        if cursor >= job.total:
            return False
        leased = self._ledger.dispatch.cancel_window(epoch, job.id)
        for _ in range(CANCELS_PER_TURN):
            reached = self._ledger.dispatch.cancel_next(epoch, job.id, cursor, leased)
            if reached is None or reached >= job.total:
                return False
            cursor = reached
        return True

    def _pause_failing(self, epoch: int, job: Job) -> None:
        if job.paused is not None or not has_too_many_failures(job, self._max_failed_share):
            return
        reason = f"too_many_failures: see `cutfleet dead {job.id}`, then continue with `cutfleet unpause {job.id}`"
        log.error("paused: %s", reason, extra={"action": "feed", "job": job.id, "failed": job.failed})
        self._ledger.dispatch.pause(epoch, job.id, reason)


def has_too_many_failures(job: Job, max_share: float) -> bool:
    """Whether failures exceed the share of images that became final since a person last unpaused the job. A job that is
    fed to its end is never paused: no image is left to save."""
    final, failed = job.final - job.acknowledged_final, job.failed - job.acknowledged_failed
    return final >= MIN_FINAL and failed > max_share * final and (job.cursor < job.total or not job.listed)


class _Reconciler:
    """Publishes again the images whose worker lost its lease and those whose message is lost. Pauses for one lease
    whenever workers could not renew theirs: Redis was away or has just started, or the machine was suspended."""

    def __init__(
        self, ledger: Ledger, metrics: DispatcherMetrics, *, lease_s: float, clock: Callable[[], float]
    ) -> None:
        self._ledger = ledger
        self._metrics = metrics
        self._lease_s = lease_s
        self._clock = clock
        self._paused_until = 0.0

    def pause(self, *, elapsed_s: float = 0.0) -> None:
        """Pause until workers have had one lease to renew, of which `elapsed_s` are over."""
        self._paused_until = max(self._paused_until, self._clock() + self._lease_s - elapsed_s)

    def pause_after_delay(self, delay_s: float) -> None:
        """Pause if a step of the loop took this much too long: then the machine was probably suspended."""
        if delay_s > self._lease_s / 2:
            self.pause()

    def reconcile(self, epoch: int) -> None:
        if self._clock() < self._paused_until:
            return
        for image in self._ledger.dispatch.reclaim_expired(epoch, lease_s=self._lease_s):
            self._metrics.reclaimed.inc()
            log.warning("lease expired: image requeued", extra={"action": "reclaim", "image": image})
        if overdue := self._ledger.dispatch.overdue(epoch):
            self._requeue_lost(epoch, overdue)

    def _requeue_lost(self, epoch: int, overdue: list[str]) -> None:
        # both lanes: a tuned job has messages on its previous one
        queues = {queue_name(lane, job.model) for job in self._ledger.jobs.open() for lane in QUEUE_LANES}
        present = self._ledger.window.images_with_message(queues)
        has_message = {image: image in present for image in overdue}
        lost = self._ledger.dispatch.requeue_lost(epoch, has_message, lease_s=self._lease_s)
        if lost:
            self._metrics.republished.inc(lost)
            log.warning("messages were lost: images requeued", extra={"action": "reconcile", "images": lost})
