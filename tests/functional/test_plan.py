"""What a submission would take, told before it is made; and that nobody submits millions by a slip."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.job import Effort, ImageState
from jobs.ledger import Ledger
from jobs.recipe import Recipe
from jobs.s3.client import Location, Role, S3Object, Store
from producer.demo.local_stack import LocalStack, inherited_environment
from producer.submission.estimate import ASSUMED_RATE, MEASURED_FROM, find_speed, has_more_than
from producer.submission.submit import Request, submit
from tests.support.environment import ROOT, Run
from tests.support.factories import Places

MODEL = "birefnet-hr"


@pytest.fixture
def env(stack: LocalStack) -> dict[str, str]:
    """A ledger that nobody else works on, and prices one can reckon with."""
    url = stack.environment["CUTFLEET_REDIS_URL"].replace("/0", "/3")
    prices = {"CUTFLEET_WORKER_USD": "36", "CUTFLEET_S3_WRITE_USD": "1000", "CUTFLEET_S3_READ_USD": "100"}
    return {"CUTFLEET_REDIS_URL": url, **prices}


@pytest.fixture
def alone(env: dict[str, str]) -> Iterator[Ledger]:
    with Ledger(env["CUTFLEET_REDIS_URL"], name="alone") as ledger:
        ledger._call("flushdb")
        yield ledger


def put(store: Store, places: Places, count: int) -> None:
    for number in range(count):
        store.put(places.key(f"{number}.jpg"), b"x" * 1000, content_type="image/jpeg")


def request_of(places: Places, *, keys: tuple[str, ...] | None = None) -> Request:
    return Request(
        source=places.source, destination=places.to, recipe=Recipe(model=MODEL), lane="backfill", name="", keys=keys
    )


def test_a_plan_says_how_many_how_large_how_long_and_how_dear(
    cutfleet: Run, store: Store, places: Places, env: dict[str, str], alone: Ledger
) -> None:
    put(store, places, 5)

    ran = cutfleet("plan", places.source, "--model", MODEL, "--workers", "2", "--exclude", "0*", "--json", env=env)
    shown = cutfleet("plan", places.source, "--model", MODEL, env=env).stdout

    planned = json.loads(ran.stdout)
    assert (planned["images"], planned["bytes"], planned["serving"], planned["workers"]) == (4, 4000, 0, 2)
    assert (planned["images_per_worker_s"], planned["seconds"]) == (ASSUMED_RATE, round(4 / ASSUMED_RATE / 2, 1))
    cost = planned["cost"]
    assert (cost["writes"], cost["reads"]) == (8, 8)
    assert cost["s3_usd"] == pytest.approx(8 + 0.8, rel=0.01)
    assert cost["worker_usd"] == pytest.approx(4 / ASSUMED_RATE / 3600 * 36, abs=1e-4)
    assert "5, 5.0 kB" in shown
    assert "no running worker serves it" in shown
    assert "assumed" in shown
    assert alone.jobs() == []


def test_the_last_job_of_the_same_model_says_how_fast_workers_are(
    store: Store, places: Places, alone: Ledger, env: dict[str, str]
) -> None:
    request = request_of(places, keys=tuple(f"{number}.jpg" for number in range(MEASURED_FROM)))
    assert find_speed(MODEL, alone).rate == ASSUMED_RATE
    job = submit(request, store=store, ledger=alone, lease_s=60, listed=lambda _: None)
    epoch = alone.lead("test", ttl_s=60)
    assert epoch is not None
    message = ("backfill.nobody", '{"v": 1}')
    assert alone.feed(epoch, job.id, 0, [message] * MEASURED_FROM, lease_s=60)
    for index in range(MEASURED_FROM):
        claim = alone.claim(f"{job.id}:{index}", token="t", output=f"o{index}", lease_s=60)
        assert alone.finish(claim, ImageState.DONE, effort=Effort("f", 0.25)) == "ok"

    found = find_speed(MODEL, alone)

    assert (found.rate, found.said_by) == (4.0, f"measured in job {job.id}")
    assert find_speed("birefnet-lite", alone).rate == ASSUMED_RATE
    busy = {"model": "birefnet-lite", "slots": 24, "in_flight": 20, "rate": 7.5}
    alone.heartbeat("gpu0@here", busy, ttl_s=60)
    alone.heartbeat("gpu1@here", busy | {"in_flight": 1, "rate": 0.1}, ttl_s=60)
    assert find_speed("birefnet-lite", alone).rate == 7.5, "one that has little to do says nothing"


def test_looking_whether_there_are_more_reads_no_further_than_it_must(places: Places) -> None:
    listed = 0

    class Endless(Store):
        def __init__(self) -> None:
            pass

        def list_pages(
            self, prefix: Location, *, role: Role, delimiter: str = "", after: str = ""
        ) -> Iterator[tuple[list[S3Object], list[str]]]:
            nonlocal listed
            while True:
                listed += 1000
                yield [S3Object(f"{listed + number:09d}.jpg", "e", 1) for number in range(1000)], []

    assert has_more_than(1000, request_of(places), Endless())
    assert listed <= 5000


def test_more_images_than_meant_are_not_submitted_where_nobody_can_be_asked(
    cutfleet: Run, store: Store, places: Places, env: dict[str, str], alone: Ledger, tmp_path: Path
) -> None:
    put(store, places, 3)
    command = ["submit", places.source, "--to", places.to, "--model", MODEL, "--confirm-over"]
    keys = "".join(f"{number}.jpg\n" for number in range(3))

    refused = cutfleet(*command, "2", env=env)
    piped = cutfleet(*command, "2", "--from", "-", stdin=keys, env=env)

    assert (refused.returncode, piped.returncode) == (2, 2)
    assert "[needs_confirmation]" in refused.stderr
    assert "--yes" in refused.stderr
    assert "[needs_confirmation]" in piped.stderr
    assert alone.jobs() == []
    assert cutfleet(*command, "3", env=env).returncode == 0
    assert cutfleet(*command, "3", "--from", "-", stdin=keys, env=env).returncode == 0
    assert cutfleet(*command, "2", "--yes", env=env).returncode == 0
    assert [job.total for job in alone.jobs()] == [3, 3, 3]


@pytest.mark.parametrize(("answer", "jobs"), [("n", 0), ("y", 1)])
def test_at_a_terminal_the_plan_is_shown_and_asked_about(
    stack: LocalStack, store: Store, places: Places, env: dict[str, str], alone: Ledger, answer: str, jobs: int
) -> None:
    put(store, places, 3)
    command = ["submit", places.source, "--to", places.to, "--model", MODEL, "--confirm-over", "2"]
    ours, theirs = pty.openpty()
    try:
        os.write(ours, f"{answer}\n".encode())
        ran = subprocess.run(
            [sys.executable, "-m", "producer", *command],
            stdin=theirs,
            env=inherited_environment() | stack.environment | env,
            capture_output=True,
            text=True,
            timeout=100,
            cwd=ROOT,
            check=False,
        )
    finally:
        os.close(ours)
        os.close(theirs)

    assert "images:  3, 3.0 kB" in ran.stderr
    assert "Submit them? [y/N]" in ran.stderr
    assert len(alone.jobs()) == jobs
    assert ran.returncode == (0 if jobs else 2)
    assert ("[not_confirmed]" in ran.stderr) is not bool(jobs)
