"""Checks of dispatcher, workers and queues."""

from __future__ import annotations

import collections
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence

from jobs.catalogue import PRESETS
from jobs.job import Job
from jobs.ledger import Ledger
from jobs.ledger.fleet import Heartbeat, count_workers
from jobs.message import RENDER_POOL, queue_name, worker_queues
from producer.doctor.findings import Finding, error, ok, warning

STUCK_S = 120.0
"""A worker whose device has images to compute makes progress far more often, even on a loaded CPU."""
LIVE_WAIT_S = 60.0
CPU_PARAMETERS_M = 10.0
"""Millions of weights; a larger model takes many seconds an image on a CPU."""


def check_fleet(ledger: Ledger, jobs: Sequence[Job]) -> Iterator[Finding]:
    """`jobs`: the open ones."""
    if ledger.dispatch.is_active():
        yield ok("queues", "A dispatcher is active.")
    else:
        yield error(
            "queues",
            "no_dispatcher",
            "No dispatcher is active: no image is fed or retried, and no job closes.",
            "Start one: cutfleet dispatch. A second one may run on standby.",
        )
    workers = ledger.fleet.workers()
    if not workers:
        yield warning("workers", "no_workers", "No worker runs.", "Start one for each GPU: python -m workers.")
    for node, beat in workers.items():
        yield from _check_worker(node, beat)
    yield from _check_revisions(workers)
    yield from _check_paused(jobs)
    yield from _check_queues(ledger, jobs, set(count_workers(workers)))


def _check_worker(node: str, beat: Heartbeat) -> Iterator[Finding]:
    ours, theirs = importlib.metadata.version("cutfleet"), beat.get("version", "an older version")
    idle_s, waiting = float(beat.get("idle_s", 0)), int(beat.get("waiting", 0))
    state = ", draining" if beat["draining"] == "1" else ""
    yield ok(
        "workers",
        f"{node}: {beat['model']} on {beat['device']} in {beat['dtype']}, {beat['images']} images, "
        f"{beat['in_flight']} in flight, last progress {idle_s:.0f} s ago{state}.",
    )
    if theirs != ours:
        yield warning(
            "workers",
            "versions_differ",
            f"{node} runs {theirs}, this is {ours}.",
            "Restart it with this version; old and new workers can run side by side until then.",
        )
    if waiting and idle_s > STUCK_S:
        yield error(
            "workers",
            "worker_stuck",
            f"{node} has {waiting} images for its device and made no progress.",
            "Check its log and nvidia-smi, then restart it: other workers take its images when their leases end.",
        )
    preset = PRESETS.get(beat["model"])
    if beat["device"] == "cpu" and preset is not None and preset.parameters_m > CPU_PARAMETERS_M:
        yield warning(
            "workers",
            "gpu_not_used",
            f"{node} serves {beat['model']} on a CPU.",
            "Set CUTFLEET_DEVICE=cuda, whose error names the reason, or serve u2netp.",
        )


def _check_revisions(workers: Mapping[str, Heartbeat]) -> Iterator[Finding]:
    revisions = collections.defaultdict(set)
    for beat in workers.values():
        revisions[beat["model"]].add(beat["revision"])
    for model, found in revisions.items():
        if len(found) > 1:
            yield error(
                "workers",
                "models_differ",
                f"Workers serve {model} with different weights: {', '.join(found)}.",
                "Pin one with CUTFLEET_MODEL_REVISION and restart them: one model must make all images of a job.",
            )


def _check_paused(jobs: Sequence[Job]) -> Iterator[Finding]:
    for job in jobs:
        if job.paused is not None:
            yield warning(
                "queues",
                "job_paused",
                f"Job {job.id} is paused with {job.open} images open: {job.paused}",
                f"Fix the cause, then: cutfleet unpause {job.id}",
            )


def _check_queues(ledger: Ledger, jobs: Sequence[Job], served: set[str]) -> Iterator[Finding]:
    for model in sorted({job.model for job in jobs} | served):
        count = sum(job.open for job in jobs if job.model == model)
        queues = ledger.window.survey(worker_queues(model)).queues
        _, live_wait_s = queues[queue_name("live", model)]
        if count and model not in served:
            yield error(
                "queues",
                "model_not_served",
                f"{count} images wait for {model}, which no running worker serves.",
                "Start a worker on a CPU." if model == RENDER_POOL else f"Start a worker with CUTFLEET_MODEL={model}.",
            )
        elif live_wait_s > LIVE_WAIT_S:
            yield warning(
                "queues",
                "live_waits",
                f"The oldest live image for {model} waits {live_wait_s:.0f} s.",
                "Start more workers, or check the findings above for why the running ones are slow.",
            )
        else:
            lengths = ", ".join(f"{length} on {queue}" for queue, (length, _) in queues.items())
            yield ok("queues", f"{count} images open for {model}; {lengths}.")
