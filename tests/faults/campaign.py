"""Random faults under load, by a seed, and what they cost; then a plain Celery task under some of them, as the control.

    SEED=7 python -m tests.faults --minutes 10
    SEED=7 python -m tests.faults --minutes 60 --only worker

Exit code 1 when an image was lost, doubled or convicted, or when a job does not pass the check of all fault tests.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import redis

from jobs.s3.client import Location
from producer.demo.local_stack import Process, inherited_environment
from tests.faults.fleet import Fleet, Reference, Zygote, make_places
from tests.faults.plain import make_plain
from tests.faults.proxy import Fault, S3Proxy, Wire
from tests.faults.terms import MODEL
from tests.faults.truth import masks, prove
from tests.support.factories import Places, put_images, wait_until

JOB_IMAGES = 200
OPEN_JOBS = 2
FAULT_S = 3.0
"""Longer than a lease of this fleet."""
SETTLE_S = 180.0
KEPT_S = 60.0
"""A closed job is judged, and its bucket deleted, when whoever was frozen has long been awake: a store has only so many
buckets."""


class Campaign:
    def __init__(self, fleet: Fleet, wire: Wire, s3: S3Proxy, seed: int, only: str) -> None:
        self.fleet, self.wire, self.s3 = fleet, wire, s3
        self.chance = random.Random(seed)
        self.faults = [name for name in FAULTS if name.startswith(only)]
        self.caused: Counter[str] = Counter()
        self.jobs: dict[str, Places] = {}
        self.found: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._reference: Reference = {}
        self.longest_stall_s = 0.0
        self._progress = (-1, time.monotonic())
        self._through = {"redis_url": f"redis://127.0.0.1:{wire.port}/0", "s3_endpoint": s3.url}
        self._source = make_places(fleet)
        self.names = put_images(fleet.store, self._source, JOB_IMAGES)

    def run(self, seconds: float) -> None:
        workers, dispatchers = self.fleet.workers, self.fleet.dispatchers
        self.kept = workers.start(test_device_ms="50", **self._through)
        for _ in range(3):
            workers.start(supervised=True, test_device_ms="50", **self._through)
        for _ in range(2):
            dispatchers.start(supervised=True, **self._through)
        self._load()
        wait_until(lambda: self._done() > JOB_IMAGES / 2)
        self.memory = [memory_mb(self.kept)]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            fault = self.chance.choice(self.faults)
            try:
                FAULTS[fault](self)
                self.caused[fault] += 1
            except (ProcessLookupError, IndexError):  # nobody there to be harmed just now
                continue
            self._watch(self.chance.uniform(0.5, 3))
            self._load()
        self.wire.heal()
        deadline = time.monotonic() + SETTLE_S
        while any(self._job_open(job) for job in self.jobs) and time.monotonic() < deadline:
            self._watch(0.5)
        self.memory.append(memory_mb(self.kept))

    def judge(self, job: str, *, alone: bool) -> None:
        """What became of a job, which is forgotten then: its own counts, and what the check of all fault tests says."""
        places, record = self.jobs.pop(job), self.fleet.ledger.job(job)
        bucket = Location.parse(places.to).bucket
        keys = {found.key for found in self.fleet.store.list_source(Location(bucket, ""))}
        made = {key for key in keys if not key.startswith("_cutfleet/")}
        pairs = [{places.cutout(name).key, places.mask(name).key} for name in self.names]
        self.found["submitted"] += JOB_IMAGES
        self.found["lost"] += record.total - sum(pair <= made for pair in pairs)
        self.found["doubled"] += len(made.difference(*pairs)) + max(0, record.final - record.total)
        self.found["failed"] += record.failed
        self.found["run more than once"] += sum(times > 1 for times in self.fleet.workers.begun(job).values())
        self._reference = self._reference or masks(self.fleet, places, self.names)
        try:
            prove(self.fleet, job, places, names=self.names, reference=self._reference, within_s=1, alone=alone)
        except AssertionError as exc:
            self.wrong.append(f"{job}: {exc}")
        delete_bucket(self.fleet, bucket, keys)

    # Load

    def _load(self) -> None:
        for job in list(self.jobs):
            if (self.fleet.ledger.job(job).closed or time.time()) < time.time() - KEPT_S:
                self.judge(job, alone=False)
        if sum(self._job_open(job) for job in self.jobs) < OPEN_JOBS:
            places = self._fresh_places()
            self.jobs[self._submit(places)] = places

    def _fresh_places(self) -> Places:
        return Places(self._source.source, make_places(self.fleet).to)

    def _submit(self, places: Places) -> str:
        """Again until it is heard, as a person would."""
        for _ in range(20):
            known = [job.id for job in self.fleet.ledger.jobs() if job.destination == places.to]
            more = ("--resume", known[0]) if known else ()
            ran = self.fleet.run("submit", places.source, "--to", places.to, "--model", MODEL, *more)
            if ran.returncode == 0:
                return ran.stdout.strip()
        raise AssertionError(ran.stderr)

    def _job_open(self, job: str) -> bool:
        return self.fleet.ledger.job(job).closed is None

    def _done(self) -> int:
        return self.found["submitted"] + sum(self.fleet.ledger.job(job).final for job in self.jobs)

    def _watch(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            done, now = self._done(), time.monotonic()
            if done != self._progress[0]:
                self._progress = (done, now)
            elif done < self.found["submitted"] + len(self.jobs) * JOB_IMAGES:
                self.longest_stall_s = max(self.longest_stall_s, now - self._progress[1])
            time.sleep(0.1)

    # Faults

    def victim(self, pids: list[int]) -> int:
        return self.chance.choice([pid for pid in pids if pid != self.kept])

    def kill_worker(self) -> None:
        os.kill(self.victim(self.fleet.workers.alive()), signal.SIGKILL)

    def freeze_and_kill_worker(self) -> None:
        pid = self.victim(self.fleet.workers.alive())
        os.kill(pid, signal.SIGSTOP)
        self._watch(self.chance.uniform(0.2, FAULT_S))
        os.kill(pid, signal.SIGKILL)

    def freeze_worker(self) -> None:
        self._freeze(self.victim(self.fleet.workers.alive()))

    def stop_worker(self) -> None:
        os.kill(self.victim(self.fleet.workers.alive()), signal.SIGTERM)

    def kill_dispatcher(self) -> None:
        os.kill(self.victim(self.fleet.dispatchers.alive()), signal.SIGKILL)

    def freeze_dispatcher(self) -> None:
        self._freeze(self.victim(self.fleet.dispatchers.alive()))

    def kill_producer(self) -> None:
        """Who asked goes on with what it has begun, or asks again."""
        places = self._fresh_places()
        pid = self.fleet.submits.start_for(places)
        self._watch(self.chance.uniform(0, 1.5))
        try:
            self.fleet.submits.kill(pid)
        finally:
            self.jobs[self._submit(places)] = places

    def pause_valkey(self) -> None:
        with redis.Redis(port=self.fleet.stack.redis_port) as client:
            client.client_pause(int(1000 * FAULT_S))
        self._watch(FAULT_S)

    def restart_valkey(self) -> None:
        valkey = self.fleet.stack.valkey
        assert valkey is not None
        valkey.signal(self.chance.choice([signal.SIGTERM, signal.SIGKILL]))
        wait_until(lambda: valkey.poll() is not None)
        valkey.kill()
        self.fleet.stack.start_valkey()

    def reset_valkey(self) -> None:
        self.wire.cut()

    def half_open_valkey(self) -> None:
        self.wire.swallow()
        self._watch(FAULT_S)
        self.wire.heal()

    def s3_away(self) -> None:
        with self.s3.fault(Fault("answer")):
            self._watch(FAULT_S)

    def s3_hangs(self) -> None:
        with self.s3.fault(Fault("hang", share=0.5)):
            self._watch(FAULT_S)

    def s3_slow_down(self) -> None:
        with self.s3.fault(Fault("answer", share=0.3)):
            self._watch(FAULT_S)

    def s3_resets(self) -> None:
        with self.s3.fault(Fault("half", methods=("GET",), share=0.5)):
            self._watch(FAULT_S)

    def s3_loses_answers(self) -> None:
        with self.s3.fault(Fault("lose", methods=("PUT",), share=0.5)):
            self._watch(FAULT_S)

    def _freeze(self, pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        self._watch(FAULT_S)
        os.kill(pid, signal.SIGCONT)


FAULTS: dict[str, Callable[[Campaign], None]] = {
    "worker killed": Campaign.kill_worker,
    "worker frozen, then killed": Campaign.freeze_and_kill_worker,
    "worker frozen, then woken": Campaign.freeze_worker,
    "worker told to go": Campaign.stop_worker,
    "dispatcher killed": Campaign.kill_dispatcher,
    "dispatcher frozen, then woken": Campaign.freeze_dispatcher,
    "producer killed": Campaign.kill_producer,
    "Valkey restarted": Campaign.restart_valkey,
    "Valkey paused": Campaign.pause_valkey,
    "Valkey's connections reset": Campaign.reset_valkey,
    "Valkey's connections half-open": Campaign.half_open_valkey,
    "S3 away (503 for everything)": Campaign.s3_away,
    "S3 hangs, for half": Campaign.s3_hangs,
    "S3 SlowDown for 30%": Campaign.s3_slow_down,
    "S3 resets in mid body": Campaign.s3_resets,
    "S3 loses the answer of a PUT": Campaign.s3_loses_answers,
}


def control(fleet: Fleet, folder: Path, chance: random.Random, seconds: float) -> tuple[int, int, int]:
    """A plain Celery task, its workers only frozen and killed. Returns messages pushed, lost, and kills."""
    url = f"redis://127.0.0.1:{fleet.stack.redis_port}/5"
    command = [sys.executable, str(Path(__file__).with_name("plain.py")), url]
    env = inherited_environment()
    app, work = make_plain(url)
    workers = [Process(command, log=folder / "plain.log", env=env) for _ in range(3)]
    pushed = kills = 0
    end = time.monotonic() + seconds
    with redis.Redis.from_url(url) as client:
        while time.monotonic() < end:
            at = chance.randrange(3)
            for step in range(30):
                work.delay(pushed, 0.05)
                pushed += 1
                time.sleep(0.1)
                if step == 20:
                    workers[at].signal(signal.SIGSTOP)
            workers[at].kill()
            kills += 1
            workers[at] = Process(command, log=folder / "plain.log", env=env)
        wait_until(lambda: not client.exists("celery", "unacked"), within_s=120)
        done = len(client.keys("done:*"))
    for worker in workers:
        worker.stop()
    app.close()
    return pushed, pushed - done, kills


def delete_bucket(fleet: Fleet, bucket: str, keys: Iterable[str]) -> None:
    for key in keys:
        fleet.store._s3.delete_object(Bucket=bucket, Key=key)
    fleet.store._s3.delete_bucket(Bucket=bucket)


def memory_mb(pid: int) -> int:
    """Resident."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) // 1024
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.faults")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--only", default="", help="faults whose name begins so, and no control")
    options = parser.parse_args()
    seconds = options.minutes * 60
    seed = int(os.environ.get("SEED") or random.randrange(10_000))
    print(f"SEED={seed}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        zygote = Zygote(folder)
        try:
            with (
                Fleet(folder, zygote) as fleet,
                Wire(fleet.stack.redis_port) as wire,
                S3Proxy(fleet.stack.s3_port, seed=seed) as s3,
            ):
                campaign = Campaign(fleet, wire, s3, seed, options.only)
                campaign.run(seconds)
                for job in list(campaign.jobs):
                    campaign.judge(job, alone=True)
                found, wrong = campaign.found, campaign.wrong
                fleet.forget()
                control_s = 0 if options.only else seconds / 5
                pushed, lost, kills = control(fleet, folder, random.Random(seed), control_s)
        finally:
            zygote.stop()
    print("| fault | times |\n|---|---|")
    for kind in campaign.faults:
        print(f"| {kind} | {campaign.caused[kind]} |")
    print(f"\n| | Cutfleet, {seconds / 60:g} min | plain Celery, {control_s / 60:g} min |\n|---|---|---|")
    print(f"| faults | {campaign.caused.total()}, as above | {kills}, workers frozen and killed |")
    print(f"| images (messages) submitted | {found['submitted']:,} | {pushed:,} |")
    print(f"| lost | {found['lost']} | {lost} |")
    for what in ("doubled", "failed", "run more than once"):
        print(f"| {what} | {found[what]} | |")
    print(f"| longest stall | {campaign.longest_stall_s:.1f} s | |")
    print(f"| resident memory of a worker, start and end | {campaign.memory[0]} MB, {campaign.memory[1]} MB | |")
    print("\n".join(wrong))
    return 1 if wrong or found["lost"] or found["doubled"] or found["failed"] else 0
