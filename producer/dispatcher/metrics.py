"""Prometheus metrics of a dispatcher, beside those of `jobs/metrics.py`. Only the active dispatcher shows queues and
jobs, so that sums over all dispatchers are correct; it drops figures older than `STALE_S`.

cutfleet_dispatcher_active                      1 while this dispatcher holds the lock
cutfleet_images_open{lane, model}               images not final, of jobs that are not paused: the work to do
cutfleet_images{state}                          in the window: ready (on a queue), leased, retrying; dead: failed, of
                                                jobs that are not closed
cutfleet_queue_images{lane, model}              length of each queue; lane may be suspect
cutfleet_queue_oldest_seconds{lane, model}      age of the next message, 0 when there is none
cutfleet_jobs{state}                            listing, running, paused, cancelling
cutfleet_workers{model}                         live workers by the model that they serve; one on a CPU also counts for
                                                `render`
cutfleet_redis_memory_used_bytes, cutfleet_redis_memory_limit_bytes   `maxmemory`, or the machine's memory without one
cutfleet_reclaimed_images_total                 images requeued because their lease expired
cutfleet_republished_images_total               images requeued because their message was lost
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import Counter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jobs.job import Job, JobState
from jobs.ledger import Ledger
from jobs.ledger.fleet import count_workers
from jobs.ledger.window import Survey
from jobs.message import LANES, QUEUE_LANES, queue_name, worker_queues
from jobs.metrics import Metrics

SURVEY_EVERY_S = 2.0
STALE_S = 30.0
"""A dispatcher that hangs on Redis must not keep showing old figures."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _View:
    taken_at: float
    jobs: Sequence[Job]
    models: Sequence[str]
    workers: Mapping[str, int]
    survey: Survey
    memory_used: int
    memory_limit: int


class DispatcherMetrics(Metrics):
    def __init__(self) -> None:
        super().__init__()
        self.reclaimed = Counter(
            "cutfleet_reclaimed_images", "Images requeued because their lease expired.", registry=self.registry
        )
        self.republished = Counter(
            "cutfleet_republished_images", "Images requeued because their message was lost.", registry=self.registry
        )
        self.view: _View | None = None
        self.registry.register(_Gauges(self))

    def survey(self, ledger: Ledger, jobs: Sequence[Job]) -> None:
        """Read the queues, at most every `SURVEY_EVERY_S`. `jobs`: those that are not closed."""
        now = time.monotonic()
        if self.view is not None and now < self.view.taken_at + SURVEY_EVERY_S:
            return
        workers = count_workers(ledger.fleet.workers())
        models = sorted({job.model for job in jobs} | set(workers))
        info = ledger.server_info()
        self.view = _View(
            taken_at=now,
            jobs=jobs,
            models=models,
            workers=workers,
            survey=ledger.window.survey([queue for model in models for queue in worker_queues(model)]),
            memory_used=info["used_memory"],
            memory_limit=info["maxmemory"] or info["total_system_memory"],
        )

    def stand_by(self) -> None:
        """Show no figures of queues and jobs."""
        self.view = None


class _Gauges(Collector):
    def __init__(self, metrics: DispatcherMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        view = self._metrics.view
        is_fresh = view is not None and time.monotonic() < view.taken_at + STALE_S
        yield GaugeMetricFamily("cutfleet_dispatcher_active", "1 if this dispatcher holds the lock.", int(is_fresh))
        if view is None or not is_fresh:
            return
        yield _open_images(view)
        yield _window(view)
        yield from _queues(view)
        yield _gauges("cutfleet_jobs", "Jobs that are not closed.", "state", _count_states(view.jobs))
        yield _gauges("cutfleet_workers", "Live workers by model.", "model", view.workers)
        yield GaugeMetricFamily("cutfleet_redis_memory_used_bytes", "Memory that Redis uses.", view.memory_used)
        yield GaugeMetricFamily("cutfleet_redis_memory_limit_bytes", "Memory that Redis may use.", view.memory_limit)


def _open_images(view: _View) -> Metric:
    counts = {(lane, model): 0 for lane in LANES for model in view.models}
    for job in view.jobs:
        if job.paused is None:
            counts[job.lane, job.model] += job.open
    family = GaugeMetricFamily(
        "cutfleet_images_open", "Images not final, of jobs that are not paused.", labels=("lane", "model")
    )
    for labels, count in counts.items():
        family.add_metric(labels, count)
    return family


def _window(view: _View) -> Metric:
    survey = view.survey
    dead = sum(job.failed for job in view.jobs)
    counts = {"ready": survey.waiting, "leased": survey.leased, "retrying": survey.retry, "dead": dead}
    return _gauges("cutfleet_images", "Images in the window, and failed images of open jobs.", "state", counts)


def _queues(view: _View) -> Iterable[Metric]:
    labels = ("lane", "model")
    length = GaugeMetricFamily("cutfleet_queue_images", "Messages on the queue.", labels=labels)
    oldest = GaugeMetricFamily("cutfleet_queue_oldest_seconds", "Age of the next message.", labels=labels)
    for model in view.models:
        for lane in QUEUE_LANES:
            count, age_s = view.survey.queues[queue_name(lane, model)]
            length.add_metric((lane, model), count)
            oldest.add_metric((lane, model), age_s)
    return length, oldest


def _count_states(jobs: Sequence[Job]) -> dict[str, int]:
    counts = collections.Counter(job.state for job in jobs)
    return {str(state): counts[state] for state in JobState if state is not JobState.CLOSED}


def _gauges(name: str, description: str, label: str, counts: Mapping[str, int]) -> Metric:
    family = GaugeMetricFamily(name, description, labels=(label,))
    for value, count in counts.items():
        family.add_metric((value,), count)
    return family
