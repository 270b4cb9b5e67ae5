"""Redis is full (`noeviction`, `maxmemory` reached): workers finish their images and can stop, submissions wait and log
why, and everything continues when Redis has memory again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

import pytest
import redis

from producer.demo.local_stack import free_port, inherited_environment
from tests.faults.fleet import IMAGES, Fleet, Reference, Submit
from tests.faults.invariants import assert_exact
from tests.faults.proc import is_stopped
from tests.faults.stand_in_settings import MODEL
from tests.support.environment import ROOT
from tests.support.images import put_images
from tests.support.places import Places
from tests.support.waiting import wait_until


@contextmanager
def full_redis(fleet: Fleet) -> Iterator[None]:
    with redis.Redis(port=fleet.stack.redis_port) as client:
        client.config_set("maxmemory", "1mb")
        try:
            yield
        finally:
            client.config_set("maxmemory", "0")


def test_workers_finish_their_images_and_stop_while_redis_is_full(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, IMAGES)
    fleet.workers.start(slots="4", test_device_ms="1500", drain_s="30")
    with fleet.dispatcher():
        job = submit()
        wait_until(lambda: fleet.workers.claim_counts(job).total() > 4, what="the first images are downloaded")
        done = fleet.ledger.jobs.get(job).done
        with full_redis(fleet):
            assert fleet.workers.terminate() == [0]

            assert fleet.ledger.jobs.get(job).done >= done + 2, "downloaded images are recorded"
            assert fleet.ledger.window.survey([]).leased == 0, "the other images are released"
            wait_until(lambda: "is full" in fleet.dispatchers.log_text(), what="the dispatcher logs it")
        fleet.workers.start()
        outcome = assert_exact(fleet, job, places, names=names, reference=reference)

    assert outcome.counts["done"] == IMAGES
    assert max(fleet.workers.publish_counts(places).values()) == 1
    assert fleet.workers.terminate() == [0]


def test_a_job_whose_last_image_ends_while_redis_is_full_is_closed(
    fleet: Fleet, places: Places, submit: Submit
) -> None:
    put_images(fleet.store, places, 4)
    fleet.workers.start(slots="4", test_device_ms="500")
    with fleet.dispatcher():
        job = submit()
        wait_until(lambda: fleet.workers.claim_counts(job).total() >= 4)

        with full_redis(fleet):
            wait_until(lambda: fleet.ledger.jobs.get(job).closed is not None, what=fleet.dispatchers.log_tail())
    fleet.workers.terminate()


@pytest.mark.parametrize("lane", ["backfill", "live"])
def test_a_submission_logs_what_it_waits_for_and_continues_when_redis_has_memory(
    fleet: Fleet, places: Places, reference: Reference, tmp_path: Path, lane: str
) -> None:
    names = put_images(fleet.store, places, 4)
    fleet.workers.start()
    log = tmp_path / "stderr"
    command = ["submit", places.source, "--to", places.to, "--model", MODEL, "--lane", lane]
    with fleet.dispatcher(), log.open("w") as stderr:
        with full_redis(fleet):
            submitting = subprocess.Popen(
                [sys.executable, "-m", "producer", *command],
                env=inherited_environment() | fleet.stack.environment,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=ROOT,
            )
            wait_until(lambda: "waits for room" in log.read_text(), what="the submission logs that it waits")
            assert submitting.poll() is None
        job = submitting.communicate(timeout=60)[0].strip()
        outcome = assert_exact(fleet, job, places, names=names, reference=reference)

    assert outcome.counts["done"] == 4
    assert "raise its maxmemory" in log.read_text()
    assert f"Job {job} waits" in log.read_text()
    fleet.workers.terminate()


def test_a_submission_that_is_killed_while_redis_is_full_can_be_resumed(
    fleet: Fleet, places: Places, reference: Reference
) -> None:
    names = put_images(fleet.store, places, 4)
    fleet.workers.start()
    flag = fleet.stack.folder / f"frozen-{places.destination.bucket}"
    submitting = fleet.submissions.start_for(places, test_freezepoints=f"before_add_part={flag}")
    wait_until(lambda: is_stopped(submitting), what="the submission is frozen")
    job = fleet.ledger.jobs.open()[-1].id
    with full_redis(fleet):
        os.kill(submitting, signal.SIGCONT)
        wait_until(lambda: f"--resume {job}" in fleet.submissions.log_text(), what="the submission logs how to resume")
        fleet.submissions.kill(submitting)

    with fleet.dispatcher():
        assert fleet.run("submit", places.source, "--resume", job).returncode == 0
        assert assert_exact(fleet, job, places, names=names, reference=reference).counts["done"] == 4
    fleet.workers.terminate()


def test_an_idle_dispatcher_counts_that_redis_is_full(fleet: Fleet) -> None:
    port = free_port()
    with fleet.dispatcher(metrics_port=str(port)), full_redis(fleet):
        wait_until(lambda: count_errors(port) > 2, what="the errors are counted")


def count_errors(port: int) -> float:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            text = answer.read().decode()
    except URLError:
        return 0.0  # it has not started
    found = [line for line in text.splitlines() if line.startswith('cutfleet_redis_errors_total{kind="redis_full"}')]
    return float(found[0].split()[-1]) if found else 0.0
