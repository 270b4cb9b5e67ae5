"""What a dispatcher shows Prometheus, beside what `jobs/metrics.py` lists. Only the active one knows the queues, so
that sums over all dispatchers are true; what it knows is not older than `STALE_S`, or not shown.

cutfleet_dispatcher_active                      1 for the one that works
cutfleet_images_open{lane, model}               not final, of jobs that are not paused: what there is to do
cutfleet_images{state}                          in the window: ready (on a queue), leased, retrying; dead: failed, of
                                                jobs that are not closed
cutfleet_queue_images{lane, model}              length of each queue; lane may be suspect
cutfleet_queue_oldest_seconds{lane, model}      age of the message that is next, 0 when there is none
cutfleet_jobs{state}                            listing, running, paused, cancelling
cutfleet_workers{model}                         workers whose heartbeat is fresh, by what they serve: one on a
                                                CPU also counts for `render`
cutfleet_redis_memory_used_bytes, cutfleet_redis_memory_limit_bytes   `maxmemory`, or the machine's memory without one
cutfleet_reclaimed_images_total                 images whose worker fell silent, published again
cutfleet_republished_images_total               images whose message was lost, published again
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Iterable, Sequence

from prometheus_client import Counter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jobs.broker import lane_queue, worker_queues
from jobs.job import Job, JobState
from jobs.ledger import Ledger, Survey
from jobs.message import LANES
from jobs.metrics import Metrics
from producer.console.fleet import count_served

SURVEY_EVERY_S = 2.0
STALE_S = 30.0
"""As old as this, a dispatcher that hangs on Redis would show what is long past."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _View:
    at: float
    jobs: Sequence[Job]
    models: Sequence[str]
    workers: collections.Counter[str]
    survey: Survey
    memory_used: int
    memory_limit: int


class DispatcherMetrics(Metrics):
    def __init__(self) -> None:
        super().__init__()
        self.reclaimed = Counter(
            "cutfleet_reclaimed_images", "Published again: their worker fell silent.", registry=self.registry
        )
        self.republished = Counter(
            "cutfleet_republished_images", "Published again: their message was lost.", registry=self.registry
        )
        self.view: _View | None = None
        self.registry.register(_Gauges(self))

    def survey(self, ledger: Ledger, jobs: Sequence[Job]) -> None:
        """Looks at the queues, at most every `SURVEY_EVERY_S`. `jobs`: those that are not closed."""
        now = time.monotonic()
        if self.view is not None and now < self.view.at + SURVEY_EVERY_S:
            return
        workers = count_served(ledger.workers())
        models = sorted({job.model for job in jobs} | set(workers))
        info = ledger.info()
        self.view = _View(
            at=now,
            jobs=jobs,
            models=models,
            workers=workers,
            survey=ledger.survey([queue for model in models for queue in worker_queues(model)]),
            memory_used=info["used_memory"],
            memory_limit=info["maxmemory"] or info["total_system_memory"],
        )

    def stand_by(self) -> None:
        self.view = None


class _Gauges(Collector):
    def __init__(self, metrics: DispatcherMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        view = self._metrics.view
        fresh = view is not None and time.monotonic() < view.at + STALE_S
        yield GaugeMetricFamily("cutfleet_dispatcher_active", "1: this one works.", int(fresh))
        if view is None or not fresh:
            return
        yield _open_images(view)
        yield _window(view)
        yield from _queues(view)
        yield _by("cutfleet_jobs", "Jobs that are not closed.", "state", _job_states(view))
        yield _by("cutfleet_workers", "Workers with a fresh heartbeat.", "model", view.workers)
        yield GaugeMetricFamily("cutfleet_redis_memory_used_bytes", "What Redis uses.", view.memory_used)
        yield GaugeMetricFamily("cutfleet_redis_memory_limit_bytes", "What Redis may use.", view.memory_limit)


def _open_images(view: _View) -> Metric:
    counts = {(lane, model): 0 for lane in LANES for model in view.models}
    for job in view.jobs:
        if job.paused is None:
            counts[job.lane, job.model] += job.open
    family = GaugeMetricFamily("cutfleet_images_open", "Images not final.", labels=("lane", "model"))
    for labels, count in counts.items():
        family.add_metric(labels, count)
    return family


def _window(view: _View) -> Metric:
    survey = view.survey
    dead = sum(job.failed for job in view.jobs)
    counts = {"ready": survey.waiting, "leased": survey.leased, "retrying": survey.retry, "dead": dead}
    return _by("cutfleet_images", "Images in the window, and failed ones of open jobs.", "state", counts)


def _queues(view: _View) -> Iterable[Metric]:
    length = GaugeMetricFamily("cutfleet_queue_images", "Messages on the queue.", labels=("lane", "model"))
    oldest = GaugeMetricFamily("cutfleet_queue_oldest_seconds", "Age of the next message.", labels=("lane", "model"))
    for model in view.models:
        for lane in (*LANES, "suspect"):
            count, age_s = view.survey.queues[lane_queue(lane, model)]
            length.add_metric((lane, model), count)
            oldest.add_metric((lane, model), age_s)
    return length, oldest


def _job_states(view: _View) -> dict[str, int]:
    states = collections.Counter(str(job.state) for job in view.jobs)
    return {str(state): states[state] for state in JobState if state is not JobState.CLOSED}


def _by(name: str, what: str, label: str, counts: collections.Counter[str] | dict[str, int]) -> Metric:
    family = GaugeMetricFamily(name, what, labels=(label,))
    for value, count in counts.items():
        family.add_metric((value,), count)
    return family
