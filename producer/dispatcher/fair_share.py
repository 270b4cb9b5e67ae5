"""Divides the room of a queue among jobs: by weight, and within the rate of a job that has one."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping

from jobs.job import Job

BURST_S = 2.0
"""A job with a rate catches up on at most this long."""


class FairShare:
    """Stride scheduling: jobs that always have images left get room exactly by their weights over time, however small
    the room of each turn. A job that had nothing to feed gets no credit for that time."""

    def __init__(self) -> None:
        self._passes: dict[str, float] = {}

    def divide(self, room: int, wanted: Mapping[str, int], weights: Mapping[str, int]) -> dict[str, int]:
        """Return how many of `room` images each job may feed, at most as many as it wants."""
        start = min((self._passes[job] for job in wanted if job in self._passes), default=0.0)
        self._passes = {job: self._passes.get(job, start) for job in wanted}
        heap = [(position, job) for job, position in self._passes.items() if wanted[job] > 0]
        heapq.heapify(heap)
        shares = dict.fromkeys(wanted, 0)
        for _ in range(room):
            if not heap:
                break
            position, job = heap[0]
            shares[job] += 1
            self._passes[job] = position + 1 / weights[job]
            if shares[job] < wanted[job]:
                heapq.heapreplace(heap, (self._passes[job], job))
            else:
                heapq.heappop(heap)
        return shares


class RateLimit:
    """Limits jobs to their rates. A dispatcher that takes over starts with an allowance of zero: no burst."""

    def __init__(self) -> None:
        self._allowances: dict[str, tuple[float, float]] = {}

    def allowed(self, job: Job, *, now: float) -> int:
        """Return how many images the job may feed. `now`: monotonic seconds."""
        if job.rate is None:
            return job.total
        allowance, since = self._allowances.get(job.id, (0.0, now))
        most = max(1.0, job.rate * BURST_S)
        allowance = min(most, allowance + job.rate * (now - since))
        self._allowances[job.id] = allowance, now
        return int(allowance)

    def use(self, job: Job, count: int) -> None:
        if job.id in self._allowances:
            allowance, since = self._allowances[job.id]
            self._allowances[job.id] = allowance - count, since

    def keep(self, job_ids: Iterable[str]) -> None:
        """Forget all other jobs."""
        self._allowances = {job: self._allowances[job] for job in job_ids if job in self._allowances}
