"""A job through a whole fleet, measured while it flows: images a second, and the processor time that each process
took for them. The start and the end of the job, when not every slot is busy, are left out.
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

import boto3

from jobs.ledger import Ledger
from jobs.recipe import Recipe
from jobs.s3.client import Location
from producer.demo.local_stack import LocalStack, Process
from producer.submission import submit as submission

_LOOK_S = 0.05
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
DEADLINE_S = 300.0


@dataclasses.dataclass(frozen=True)
class Flow:
    """`rate`: images a second while it flows. `whole_rate`: of the whole job, from before it is submitted until the
    last image is done. `cpu_ms`: processor time an image, by process. `peak_mb`: resident memory of all workers
    together, the most that was seen. `idle`: share of this machine's cores that did nothing, 0 to 1."""

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
        """`photos`: in turn."""
        with self.stack.store() as store:
            store.create_bucket(bucket)
            for number in range(count):
                store.put(
                    Location(bucket, f"p{number:05d}.jpg"), photos[number % len(photos)], content_type="image/jpeg"
                )

    def run(
        self, bucket: str, recipe: Recipe, workers: Sequence[Process], *, slots: int, target: str | None = None
    ) -> Flow:
        """Cuts out everything in `bucket`. `slots`: of all workers together. `target`: a bucket that is there and
        stays; without it, one that is made and goes again.
        """
        assert self.dispatcher is not None
        assert self.stack.valkey is not None
        assert self.stack.s3 is not None
        pids = {
            "worker": [worker.pid for worker in workers],
            "store": [self.stack.s3.pid],
            "broker": [self.stack.valkey.pid],
            "dispatcher": [self.dispatcher.pid],
        }
        self._jobs += 1
        with self.stack.store() as store, self.stack.ledger() as ledger:
            to = target or f"{bucket}-results-{self._jobs}"
            if target is None:
                store.create_bucket(to)
            request = submission.Request(
                source=f"s3://{bucket}/",
                destination=f"s3://{to}/",
                recipe=recipe,
                lane="backfill",
                name="bench",
                keys=None,
            )
            began = time.monotonic()
            job = submission.submit(request, store=store, ledger=ledger, lease_s=60, listed=lambda _: None)
            samples = []
            deadline = time.monotonic() + DEADLINE_S
            while True:
                job = ledger.job(job.id)
                assert not job.failed, f"images failed in job {job.id}; see {self.stack.folder}"
                samples.append(
                    _Sample(time.monotonic(), job.done, _cpu_s(pids), _resident_mb(pids["worker"]), _idle_s())
                )
                if job.done == job.total:
                    if target is None:
                        self._drop(job.id, to, ledger)
                    return _flow(samples, slots, began=began)
                assert time.monotonic() < deadline, f"{job.done} of {job.total} after {DEADLINE_S} s"
                time.sleep(_LOOK_S)

    def _drop(self, job: str, bucket: str, ledger: Ledger) -> None:
        """SeaweedFS takes a bucket with all that is in it, its files too: rounds do not fill the disk. Waits for
        the job's end first: its report would be tried again and again."""
        deadline = time.monotonic() + DEADLINE_S
        while ledger.job(job).closed is None:
            assert time.monotonic() < deadline, f"job {job} is not closed; see {self.stack.folder}"
            time.sleep(_LOOK_S)
        environment = self.stack.environment
        client = boto3.client(
            "s3",
            endpoint_url=environment["CUTFLEET_S3_ENDPOINT"],
            aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
            region_name=environment["AWS_DEFAULT_REGION"],
        )
        client.delete_bucket(Bucket=bucket)


@contextlib.contextmanager
def fleet() -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory(prefix="cutfleet-bench-") as folder:
        made = Fleet(Path(folder))
        with made.stack:
            made.dispatcher = made.stack.start_dispatcher()
            yield made


@contextlib.contextmanager
def valkey_alone() -> Iterator[LocalStack]:
    """A stack of nothing else; it ends however far it came."""
    with tempfile.TemporaryDirectory(prefix="cutfleet-bench-") as folder:
        stack = LocalStack(Path(folder))
        try:
            stack.start_valkey()
            yield stack
        finally:
            stack.stop()


def cpu_s(pid: int) -> float:
    """User and system time of a process so far, its threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S


def resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def _cpu_s(pids: Mapping[str, Sequence[int]]) -> dict[str, float]:
    return {name: sum(cpu_s(pid) for pid in group) for name, group in pids.items()}


def _idle_s() -> float:
    """Of all cores together, since the machine started."""
    return int(Path("/proc/stat").read_text().split(maxsplit=5)[4]) * _TICK_S


def _resident_mb(pids: Sequence[int]) -> float:
    return sum(resident_mb(pid) for pid in pids)


def _flow(samples: Sequence[_Sample], slots: int, *, began: float) -> Flow:
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
