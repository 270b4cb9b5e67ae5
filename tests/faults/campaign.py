"""Random faults under load, and what they cost; then a plain Celery task under some of the faults, as the control.

    SEED=7 python -m tests.faults --minutes 10
    SEED=7 python -m tests.faults --minutes 60 --only worker

Exit code 1 when an image was lost, doubled or failed, or when a job is not exact (`invariants.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import redis

from jobs.s3.location import Location
from producer.demo.local_stack import Process, inherited_environment
from tests.faults.fleet import Fleet, Reference
from tests.faults.fork_server import ForkServer
from tests.faults.invariants import assert_exact, read_masks
from tests.faults.plain_celery import make_plain_app
from tests.faults.proc import resident_mb
from tests.faults.processes import ForkedProcesses
from tests.faults.random_faults import FAULTS
from tests.faults.s3_proxy import S3Proxy
from tests.faults.stand_in_settings import MODEL
from tests.faults.wire import Wire
from tests.support.images import put_images
from tests.support.places import Places, plain_client
from tests.support.waiting import wait_until

JOB_IMAGES = 200
OPEN_JOBS = 2
SETTLE_S = 180.0
KEPT_S = 60.0
"""A closed job is checked and its bucket deleted after this time, when every frozen process has resumed: a store takes
a limited number of buckets."""


class Campaign:
    """`spared`: a worker that no fault hits, to see its memory grow. `totals`: counts of the checked jobs. `errors`: of
    jobs that are not exact. `memory_mb`: of the spared worker, at the start and at the end."""

    def __init__(self, fleet: Fleet, wire: Wire, s3: S3Proxy, seed: int, only: str) -> None:
        self.fleet, self.wire, self.s3 = fleet, wire, s3
        self.random = random.Random(seed)
        self.faults = [name for name in FAULTS if name.startswith(only)]
        self.caused: Counter[str] = Counter()
        self.jobs: dict[str, Places] = {}
        self.totals: Counter[str] = Counter()
        self.errors: list[str] = []
        self.longest_stall_s = 0.0
        self.memory_mb: list[int] = []
        self._reference: Reference = {}
        self._progress = (-1, time.monotonic())
        self._proxied = {"redis_url": f"redis://127.0.0.1:{wire.port}/0", "s3_endpoint": s3.url}
        self._source = fleet.create_places()
        self._names = put_images(fleet.store, self._source, JOB_IMAGES)

    def run(self, seconds: float) -> None:
        self._start_processes()
        self._keep_jobs_open()
        wait_until(lambda: self._count_final() > JOB_IMAGES / 2, what="half of a job is final")
        self.memory_mb.append(resident_mb(self.spared))
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            fault = self.random.choice(self.faults)
            try:
                FAULTS[fault](self)
                self.caused[fault] += 1
            except (ProcessLookupError, IndexError):  # there is no such process just now
                continue
            self.watch(self.random.uniform(0.5, 3))
            self._keep_jobs_open()
        self.wire.heal()
        deadline = time.monotonic() + SETTLE_S
        while any(self._is_open(job) for job in self.jobs) and time.monotonic() < deadline:
            self.watch(0.5)
        self.memory_mb.append(resident_mb(self.spared))

    def check(self, job: str, *, only_job: bool) -> None:
        """Check a closed job, add its counts to `totals`, and delete its bucket."""
        places, record = self.jobs.pop(job), self.fleet.ledger.jobs.get(job)
        bucket = Location(places.destination.bucket, "")
        keys = {found.key for found in self.fleet.store.list_source(bucket)}
        outputs = {key for key in keys if not key.startswith("_cutfleet/")}
        pairs = [{places.cutout(name).key, places.mask(name).key} for name in self._names]
        self.totals["submitted"] += JOB_IMAGES
        self.totals["lost"] += record.total - sum(pair <= outputs for pair in pairs)
        self.totals["doubled"] += len(outputs.difference(*pairs)) + max(0, record.final - record.total)
        self.totals["failed"] += record.failed
        self.totals["run more than once"] += sum(times > 1 for times in self.fleet.workers.claim_counts(job).values())
        self._reference = self._reference or read_masks(self.fleet, places, self._names)
        try:
            assert_exact(
                self.fleet,
                job,
                places,
                names=self._names,
                reference=self._reference,
                within_s=1,
                only_job=only_job,
            )
        except AssertionError as exc:
            self.errors.append(f"{job}: {exc}")
        _delete_bucket(self.fleet, bucket.bucket, keys)

    def choose_process(self, processes: ForkedProcesses) -> int:
        return self.random.choice([pid for pid in processes.alive() if pid != self.spared])

    def new_places(self) -> Places:
        return Places(self._source.source, self.fleet.create_places().to)

    def submit(self, places: Places) -> str:
        """Submit, and resume until the command succeeds, as a person would."""
        for _ in range(20):
            ids = [job.id for job in self.fleet.ledger.jobs.newest() if job.destination == places.destination]
            resume = ("--resume", ids[0]) if ids else ()
            ran = self.fleet.run("submit", places.source, "--to", places.to, "--model", MODEL, *resume)
            if ran.returncode == 0:
                return ran.stdout.strip()
        raise AssertionError(ran.stderr)

    def watch(self, seconds: float) -> None:
        """Let time pass; measure how long no image becomes final."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            final, now = self._count_final(), time.monotonic()
            if final != self._progress[0]:
                self._progress = (final, now)
            elif final < self.totals["submitted"] + len(self.jobs) * JOB_IMAGES:
                self.longest_stall_s = max(self.longest_stall_s, now - self._progress[1])
            time.sleep(0.1)

    def _start_processes(self) -> None:
        workers, dispatchers = self.fleet.workers, self.fleet.dispatchers
        self.spared = workers.start(test_device_ms="50", **self._proxied)
        for _ in range(3):
            workers.start_supervised(test_device_ms="50", **self._proxied)
        for _ in range(2):
            dispatchers.start_supervised(**self._proxied)

    def _keep_jobs_open(self) -> None:
        for job in list(self.jobs):
            if (self.fleet.ledger.jobs.get(job).closed or time.time()) < time.time() - KEPT_S:
                self.check(job, only_job=False)
        if sum(self._is_open(job) for job in self.jobs) < OPEN_JOBS:
            places = self.new_places()
            self.jobs[self.submit(places)] = places

    def _is_open(self, job: str) -> bool:
        return self.fleet.ledger.jobs.get(job).closed is None

    def _count_final(self) -> int:
        return self.totals["submitted"] + sum(self.fleet.ledger.jobs.get(job).final for job in self.jobs)


@dataclasses.dataclass
class Control:
    """Counts of the plain Celery task. `lost`: messages that no worker finished."""

    pushed: int = 0
    lost: int = 0
    kills: int = 0


def run_control(fleet: Fleet, folder: Path, chance: random.Random, seconds: float) -> Control:
    """Run a plain Celery task; freeze and kill its workers."""
    url = f"redis://127.0.0.1:{fleet.stack.redis_port}/5"
    command = [sys.executable, str(Path(__file__).with_name("plain_celery.py")), url]
    log, env = folder / "plain.log", inherited_environment()
    app, work = make_plain_app(url)
    workers = [Process(command, log=log, env=env) for _ in range(3)]
    counts = Control()
    end = time.monotonic() + seconds
    with redis.Redis.from_url(url) as client:
        while time.monotonic() < end:
            at = chance.randrange(3)
            for step in range(30):
                work.delay(counts.pushed, 0.05)
                counts.pushed += 1
                time.sleep(0.1)
                if step == 20:
                    workers[at].signal(signal.SIGSTOP)
            workers[at].kill()
            counts.kills += 1
            workers[at] = Process(command, log=log, env=env)
        wait_until(lambda: not client.exists("celery", "unacked"), within_s=120, what="no message is left")
        counts.lost = counts.pushed - len(client.keys("done:*"))
    for worker in workers:
        worker.stop()
    app.close()
    return counts


def _delete_bucket(fleet: Fleet, bucket: str, keys: Iterable[str]) -> None:
    with plain_client(fleet.store) as s3:
        for key in keys:
            s3.delete_object(Bucket=bucket, Key=key)
        s3.delete_bucket(Bucket=bucket)


def _print_report(campaign: Campaign, control: Control, *, seconds: float, control_s: float) -> None:
    totals = campaign.totals
    print("| fault | times |\n|---|---|")
    for name in campaign.faults:
        print(f"| {name} | {campaign.caused[name]} |")
    print(f"\n| | Cutfleet, {seconds / 60:g} min | plain Celery, {control_s / 60:g} min |\n|---|---|---|")
    print(f"| faults | {campaign.caused.total()}, as above | {control.kills}, workers frozen and killed |")
    print(f"| images (messages) submitted | {totals['submitted']:,} | {control.pushed:,} |")
    print(f"| lost | {totals['lost']} | {control.lost} |")
    for name in ("doubled", "failed", "run more than once"):
        print(f"| {name} | {totals[name]} | |")
    print(f"| longest stall | {campaign.longest_stall_s:.1f} s | |")
    print(f"| resident memory of a worker, start and end | {' MB, '.join(map(str, campaign.memory_mb))} MB | |")
    print("\n".join(campaign.errors))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.faults")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--only", default="", help="cause only faults whose name begins with this; run no control")
    options = parser.parse_args()
    seconds = options.minutes * 60
    control_s = 0 if options.only else seconds / 5
    seed = int(os.environ.get("SEED") or random.randrange(10_000))
    print(f"SEED={seed}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fork_server = ForkServer(folder)
        with contextlib.ExitStack() as stack:
            stack.callback(fork_server.stop)
            fleet = stack.enter_context(Fleet(folder, fork_server))
            wire = stack.enter_context(Wire(fleet.stack.redis_port))
            s3 = stack.enter_context(S3Proxy(fleet.stack.s3_port, seed=seed))
            campaign = Campaign(fleet, wire, s3, seed, options.only)
            campaign.run(seconds)
            for job in list(campaign.jobs):
                campaign.check(job, only_job=True)
            fleet.kill_all()
            control = run_control(fleet, folder, random.Random(seed), control_s)
    _print_report(campaign, control, seconds=seconds, control_s=control_s)
    totals = campaign.totals
    return 1 if campaign.errors or totals["lost"] or totals["doubled"] or totals["failed"] else 0
