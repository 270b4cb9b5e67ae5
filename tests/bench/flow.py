"""Runs a job through a whole fleet and measures images per second and the processor time of each process. Start and end
of the job, when not every slot is busy, are left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jobs.ledger import Ledger
from jobs.recipe import Recipe
from jobs.s3.location import Location
from producer.demo.local_stack import LocalStack, Process
from producer.submission.request import Request
from producer.submission.submit import submit
from tests.support.places import plain_client

_POLL_S = 0.05
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
DEADLINE_S = 300.0


@dataclasses.dataclass(frozen=True)
class Flow:
    """`rate`: images per second while every slot is busy. `whole_rate`: of the whole job, from before its submission
    until its last image is done. `cpu_ms`: processor time per image, by process. `peak_mb`: greatest resident memory of
    all workers together. `idle`: idle share of this machine's cores, 0 to 1."""

    rate: float
    whole_rate: float
    cpu_ms: Mapping[str, float]
    peak_mb: float
    idle: float


class _Sample(NamedTuple):
    at: float
    done: int
    cpu_s: Mapping[str, float]
    resident_mb: float
    idle_s: float


class Fleet:
    """A local stack with a dispatcher, and one source bucket for each kind of image."""

    def __init__(self, folder: Path) -> None:
        self.stack = LocalStack(folder)
        self.dispatcher: Process | None = None
        self._jobs = 0

    def upload(self, bucket: str, count: int, *photos: bytes) -> None:
        """Upload `count` images, which are `photos` in turn."""
        with self.stack.store() as store:
            store.create_bucket(bucket)
            for number in range(count):
                store.put(
                    Location(bucket, f"p{number:05d}.jpg"), photos[number % len(photos)], content_type="image/jpeg"
                )

    def run(
        self, bucket: str, recipe: Recipe, workers: Sequence[Process], *, slots: int, target: str | None = None
    ) -> Flow:
        """Cut out everything in `bucket`. `slots`: of all workers together. `target`: an existing bucket that is kept;
        None: a bucket for this run."""
        self._jobs += 1
        pids = self._pids(workers)
        with self.stack.store() as store, self.stack.ledger() as ledger:
            to = target or f"{bucket}-results-{self._jobs}"
            if target is None:
                store.create_bucket(to)
            request = Request(
                source=Location(bucket, ""),
                destination=Location(to, ""),
                recipe=recipe,
                lane="backfill",
                name="bench",
                keys=None,
            )
            began = time.monotonic()
            job = submit(request, store=store, ledger=ledger, lease_s=60, listed=lambda _: None)
            samples = self._sample(job.id, pids, ledger)
            if target is None:
                self._drop(job.id, to, ledger)
            return _measure_flow(samples, slots, began=began)

    def _pids(self, workers: Sequence[Process]) -> dict[str, list[int]]:
        assert self.dispatcher is not None
        assert self.stack.valkey is not None
        assert self.stack.s3 is not None
        return {
            "worker": [worker.pid for worker in workers],
            "store": [self.stack.s3.pid],
            "broker": [self.stack.valkey.pid],
            "dispatcher": [self.dispatcher.pid],
        }

    def _sample(self, job_id: str, pids: Mapping[str, Sequence[int]], ledger: Ledger) -> list[_Sample]:
        """Sample until the last image is done. Raises `AssertionError` when an image fails."""
        samples: list[_Sample] = []
        deadline = time.monotonic() + DEADLINE_S
        while True:
            job = ledger.jobs.get(job_id)
            assert not job.failed, f"images failed in job {job_id}; see {self.stack.folder}"
            samples.append(_Sample(time.monotonic(), job.done, _cpu_s(pids), _resident_mb(pids["worker"]), _idle_s()))
            if job.done == job.total:
                return samples
            assert time.monotonic() < deadline, f"{job.done} of {job.total} after {DEADLINE_S} s"
            time.sleep(_POLL_S)

    def _drop(self, job: str, bucket: str, ledger: Ledger) -> None:
        """Delete a bucket with its objects, so that rounds do not fill the disk. Waits until the job is closed: its
        report could not be written otherwise."""
        deadline = time.monotonic() + DEADLINE_S
        while ledger.jobs.get(job).closed is None:
            assert time.monotonic() < deadline, f"job {job} is not closed; see {self.stack.folder}"
            time.sleep(_POLL_S)
        with self.stack.store() as store, plain_client(store) as client:
            client.delete_bucket(Bucket=bucket)


@contextlib.contextmanager
def run_fleet() -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory(prefix="cutfleet-bench-") as folder:
        fleet = Fleet(Path(folder))
        with fleet.stack:
            fleet.dispatcher = fleet.stack.start_dispatcher()
            yield fleet


@contextlib.contextmanager
def run_valkey() -> Iterator[LocalStack]:
    """Run a local stack of Valkey only."""
    with tempfile.TemporaryDirectory(prefix="cutfleet-bench-") as folder:
        stack = LocalStack(Path(folder))
        try:
            stack.start_valkey()
            yield stack
        finally:
            stack.stop()


def cpu_s(pid: int) -> float:
    """Return user and system time of a process with all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S


def resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def _cpu_s(pids: Mapping[str, Sequence[int]]) -> dict[str, float]:
    return {name: sum(cpu_s(pid) for pid in group) for name, group in pids.items()}


def _idle_s() -> float:
    """Return the idle time of all cores together since the machine started."""
    return int(Path("/proc/stat").read_text().split(maxsplit=5)[4]) * _TICK_S


def _resident_mb(pids: Sequence[int]) -> float:
    return sum(resident_mb(pid) for pid in pids)


def _measure_flow(samples: Sequence[_Sample], slots: int, *, began: float) -> Flow:
    total = samples[-1].done
    flowing = [sample for sample in samples if slots <= sample.done <= total - slots]
    first, last = flowing[0], flowing[-1]
    count, seconds = last.done - first.done, last.at - first.at
    assert count, "too few images for this many slots"

    return Flow(
        rate=count / seconds,
        whole_rate=total / (samples[-1].at - began),
        cpu_ms={name: (last.cpu_s[name] - first.cpu_s[name]) / count * 1000 for name in last.cpu_s},
        peak_mb=max(sample.resident_mb for sample in samples),
        idle=(last.idle_s - first.idle_s) / seconds / len(os.sched_getaffinity(0)),
    )
