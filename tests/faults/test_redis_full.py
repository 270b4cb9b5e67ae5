"""Redis takes nothing new (`noeviction`, `maxmemory` reached): workers end what they hold and may leave, submitting
waits in words, and all goes on when there is room."""

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

from jobs.s3.client import Location
from producer.demo.local_stack import free_port, inherited_environment
from tests.faults.fleet import IMAGES, ROOT, Fleet, Reference, Submit, is_stopped
from tests.faults.terms import MODEL
from tests.faults.truth import prove
from tests.support.factories import Places, put_images, wait_until


@contextmanager
def full(fleet: Fleet) -> Iterator[None]:
    with redis.Redis(port=fleet.stack.redis_port) as client:
        client.config_set("maxmemory", "1mb")
        try:
            yield
        finally:
            client.config_set("maxmemory", "0")


def test_workers_end_what_they_hold_and_leave_and_the_rest_goes_on_when_there_is_room(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, IMAGES)
    fleet.workers.start(slots="4", test_device_ms="1500", drain_s="30")
    with fleet.dispatcher():
        job = submit()
        wait_until(lambda: fleet.workers.begun(job).total() > 4, what="the first are past fetching")
        done = fleet.ledger.job(job).done
        with full(fleet):
            assert fleet.workers.dismiss() == [0]

            assert fleet.ledger.job(job).done >= done + 2, "what was past fetching is recorded"
            assert fleet.ledger.survey([]).leased == 0, "what was not is given back"
            wait_until(lambda: "is full" in fleet.dispatchers.text())
        fleet.workers.start()
        truth = prove(fleet, job, places, names=names, reference=reference)

    assert truth.counts["done"] == IMAGES
    assert max(fleet.workers.published(places).values()) == 1
    assert fleet.workers.dismiss() == [0]


def test_a_job_that_ends_while_redis_is_full_is_closed(fleet: Fleet, places: Places, submit: Submit) -> None:
    put_images(fleet.store, places, 4)
    fleet.workers.start(slots="4", test_device_ms="500")
    with fleet.dispatcher():
        job = submit()
        wait_until(lambda: fleet.workers.begun(job).total() >= 4)

        with full(fleet):
            wait_until(lambda: fleet.ledger.job(job).closed is not None, what=fleet.dispatchers.words())
    fleet.workers.dismiss()


@pytest.mark.parametrize("lane", ["backfill", "live"])
def test_submitting_says_what_it_waits_for_and_goes_on_when_there_is_room(
    fleet: Fleet, places: Places, reference: Reference, tmp_path: Path, lane: str
) -> None:
    names = put_images(fleet.store, places, 4)
    fleet.workers.start()
    said = tmp_path / "stderr"
    command = ["submit", places.source, "--to", places.to, "--model", MODEL, "--lane", lane]
    with fleet.dispatcher(), said.open("w") as stderr:
        with full(fleet):
            submitting = subprocess.Popen(
                [sys.executable, "-m", "producer", *command],
                env=inherited_environment() | fleet.stack.environment,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=ROOT,
            )
            wait_until(lambda: "waits for room" in said.read_text(), what="it says so")
            assert submitting.poll() is None
        job = submitting.communicate(timeout=60)[0].strip()
        truth = prove(fleet, job, places, names=names, reference=reference)

    assert truth.counts["done"] == 4
    assert "raise its maxmemory" in said.read_text()
    assert f"Job {job} waits" in said.read_text()
    fleet.workers.dismiss()


def test_a_listing_that_is_interrupted_while_redis_is_full_can_be_resumed(
    fleet: Fleet, places: Places, reference: Reference
) -> None:
    names = put_images(fleet.store, places, 4)
    fleet.workers.start()
    flag = fleet.stack.folder / f"frozen-{Location.parse(places.to).bucket}"
    submitting = fleet.submits.start_for(places, test_freezepoints=f"before_add_part={flag}")
    wait_until(lambda: is_stopped(submitting), what="it is frozen")
    job = fleet.ledger.open_jobs()[-1].id
    with full(fleet):
        os.kill(submitting, signal.SIGCONT)
        wait_until(lambda: f"--resume {job}" in fleet.submits.text(), what="it says how to go on")
        fleet.submits.kill(submitting)

    with fleet.dispatcher():
        assert fleet.run("submit", places.source, "--resume", job).returncode == 0
        assert prove(fleet, job, places, names=names, reference=reference).counts["done"] == 4
    fleet.workers.dismiss()


def test_a_dispatcher_with_nothing_to_do_counts_that_redis_is_full(fleet: Fleet) -> None:
    port = free_port()
    with fleet.dispatcher(metrics_port=str(port)), full(fleet):
        wait_until(lambda: errors(port) > 2, what="it is counted")


def errors(port: int) -> float:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            text = answer.read().decode()
    except URLError:
        return 0.0  # it is just starting
    found = [line for line in text.splitlines() if line.startswith('cutfleet_redis_errors_total{kind="redis_full"}')]
    return float(found[0].split()[-1]) if found else 0.0
