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
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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


class DispatcherMetrics(Metrics, Collector):
    def __init__(self) -> None:
        super().__init__()
        self.reclaimed = Counter(
            "cutfleet_reclaimed_images", "Images requeued because their lease expired.", registry=self.registry
        )
        self.republished = Counter(
            "cutfleet_republished_images", "Images requeued because their message was lost.", registry=self.registry
        )
        self._surveyed_at = -math.inf
        self._gauges: list[Metric] = []
        self.registry.register(self)

    def survey(self, ledger: Ledger, jobs: Sequence[Job]) -> None:
        """Read the queues, at most every `SURVEY_EVERY_S`. `jobs`: those that are not closed."""
        now = time.monotonic()
        if now < self._surveyed_at + SURVEY_EVERY_S:
            return
        workers = count_workers(ledger.fleet.workers())
        models = sorted({job.model for job in jobs} | set(workers))
        survey = ledger.window.survey([queue for model in models for queue in worker_queues(model)])
        info = ledger.server_info()
        limit = info["maxmemory"] or info["total_system_memory"]
        self._gauges = [
            _open_images(jobs, models),
            _window(jobs, survey),
            *_queues(models, survey),
            _job_states(jobs),
            _gauge("cutfleet_workers", "Live workers by model.", ["model"], {(m,): n for m, n in workers.items()}),
            GaugeMetricFamily("cutfleet_redis_memory_used_bytes", "Memory that Redis uses.", info["used_memory"]),
            GaugeMetricFamily("cutfleet_redis_memory_limit_bytes", "Memory that Redis may use.", limit),
        ]
        self._surveyed_at = now

    def stand_by(self) -> None:
        """Show no figures of queues and jobs."""
        self._surveyed_at = -math.inf

    def collect(self) -> Iterable[Metric]:
        is_fresh = time.monotonic() < self._surveyed_at + STALE_S
        active = GaugeMetricFamily("cutfleet_dispatcher_active", "1 if this dispatcher holds the lock.", int(is_fresh))
        return [active, *self._gauges] if is_fresh else [active]


def _open_images(jobs: Sequence[Job], models: Sequence[str]) -> Metric:
    counts = {(lane, model): 0 for lane in LANES for model in models}
    for job in jobs:
        if job.paused is None:
            counts[job.lane, job.model] += job.open
    text = "Images not final, of jobs that are not paused."
    return _gauge("cutfleet_images_open", text, ["lane", "model"], counts)


def _window(jobs: Sequence[Job], survey: Survey) -> Metric:
    dead = sum(job.failed for job in jobs)
    counts = {("ready",): survey.waiting, ("leased",): survey.leased, ("retrying",): survey.retry, ("dead",): dead}
    return _gauge("cutfleet_images", "Images in the window, and failed images of open jobs.", ["state"], counts)


def _queues(models: Sequence[str], survey: Survey) -> tuple[Metric, Metric]:
    found = {(lane, model): survey.queues[queue_name(lane, model)] for model in models for lane in QUEUE_LANES}
    counts = {labels: count for labels, (count, _) in found.items()}
    ages = {labels: age_s for labels, (_, age_s) in found.items()}
    return (
        _gauge("cutfleet_queue_images", "Messages on the queue.", ["lane", "model"], counts),
        _gauge("cutfleet_queue_oldest_seconds", "Age of the next message.", ["lane", "model"], ages),
    )


def _job_states(jobs: Sequence[Job]) -> Metric:
    found = collections.Counter(job.state for job in jobs)
    counts = {(str(state),): found[state] for state in JobState if state is not JobState.CLOSED}
    return _gauge("cutfleet_jobs", "Jobs that are not closed.", ["state"], counts)


def _gauge(name: str, text: str, labels: Sequence[str], values: Mapping[Any, float]) -> Metric:
    """`values`: by the values of `labels`."""
    family = GaugeMetricFamily(name, text, labels=labels)
    for label_values, value in values.items():
        family.add_metric(label_values, value)
    return family
