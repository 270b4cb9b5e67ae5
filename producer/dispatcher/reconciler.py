"""Reconciliation: publishes again the images whose worker lost its lease and those whose message is lost.

It pauses for one lease whenever workers could not renew theirs: Redis was away or has just started, or the machine was
suspended.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from jobs.ledger import Ledger
from jobs.message import QUEUE_LANES, queue_name
from producer.dispatcher.metrics import DispatcherMetrics

log = logging.getLogger(__name__)


class Reconciler:
    """Belongs to one dispatcher; not safe for threads."""

    def __init__(
        self, ledger: Ledger, metrics: DispatcherMetrics, *, lease_s: float, clock: Callable[[], float]
    ) -> None:
        """`clock`: seconds; must run on while the machine is suspended."""
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
