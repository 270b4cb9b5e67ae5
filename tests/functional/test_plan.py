"""`cutfleet plan` estimates a submission, and a large submission needs a confirmation."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.job import ImageState
from jobs.ledger import Ledger
from jobs.ledger.window import Recorded
from jobs.recipe import Recipe
from jobs.results import Usage
from jobs.s3.client import S3Object, Store
from jobs.s3.errors import Role
from jobs.s3.location import Location
from producer.demo.local_stack import LocalStack, inherited_environment
from producer.submission.estimate import ASSUMED_RATE, MIN_MEASURED, find_speed, has_more_than
from producer.submission.request import Request
from producer.submission.submit import submit
from tests.support.environment import ROOT, Run
from tests.support.places import Places

MODEL = "birefnet-hr"


@pytest.fixture
def env(stack: LocalStack) -> dict[str, str]:
    """Settings of a Redis database without dispatcher, and round prices."""
    url = stack.environment["CUTFLEET_REDIS_URL"].replace("/0", "/3")
    prices = {"CUTFLEET_WORKER_USD": "36", "CUTFLEET_S3_WRITE_USD": "1000", "CUTFLEET_S3_READ_USD": "100"}
    return {"CUTFLEET_REDIS_URL": url, **prices}


@pytest.fixture
def own_ledger(env: dict[str, str]) -> Iterator[Ledger]:
    with Ledger(env["CUTFLEET_REDIS_URL"], name="own") as ledger:
        ledger.connection.call("flushdb")
        yield ledger


def put(store: Store, places: Places, count: int) -> None:
    for number in range(count):
        store.put(places.key(f"{number}.jpg"), b"x" * 1000, content_type="image/jpeg")


def make_request(places: Places, *, keys: tuple[str, ...] | None = None) -> Request:
    return Request(
        source=places.source_location,
        destination=places.destination,
        recipe=Recipe(model=MODEL),
        lane="backfill",
        name="",
        keys=keys,
    )


def test_a_plan_shows_number_size_time_and_cost(
    cutfleet: Run, store: Store, places: Places, env: dict[str, str], own_ledger: Ledger
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
    assert own_ledger.jobs.newest() == []


def test_the_speed_comes_from_the_last_job_of_the_model_or_from_busy_workers(
    store: Store, places: Places, own_ledger: Ledger, env: dict[str, str]
) -> None:
    request = make_request(places, keys=tuple(f"{number}.jpg" for number in range(MIN_MEASURED)))
    assert find_speed(MODEL, own_ledger).rate == ASSUMED_RATE
    job = submit(request, store=store, ledger=own_ledger, lease_s=60, listed=lambda _: None)
    epoch = own_ledger.dispatch.lead("test", ttl_s=60)
    assert epoch is not None
    message = ("backfill.unserved", '{"v": 1}')
    assert own_ledger.dispatch.feed(epoch, job.id, 0, [message] * MIN_MEASURED, lease_s=60)
    for index in range(MIN_MEASURED):
        claim = own_ledger.window.claim(f"{job.id}:{index}", token="t", output=f"o{index}", lease_s=60)
        assert own_ledger.window.finish(claim, ImageState.DONE, usage=Usage("f", 0.25)) is Recorded.OK

    found = find_speed(MODEL, own_ledger)

    assert (found.rate, found.origin) == (4.0, f"measured in job {job.id}")
    assert find_speed("birefnet-lite", own_ledger).rate == ASSUMED_RATE
    busy: dict[str, str | int | float] = {"model": "birefnet-lite", "slots": 24, "in_flight": 20, "rate": 7.5}
    own_ledger.fleet.heartbeat("gpu0@here", busy, ttl_s=60)
    own_ledger.fleet.heartbeat("gpu1@here", busy | {"in_flight": 1, "rate": 0.1}, ttl_s=60)
    assert find_speed("birefnet-lite", own_ledger).rate == 7.5, "an idle worker does not count"


def test_counting_for_a_confirmation_lists_no_further_than_needed(places: Places) -> None:
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

    assert has_more_than(1000, make_request(places), Endless())
    assert listed <= 5000


def test_without_a_terminal_a_large_submission_needs_yes(
    cutfleet: Run, store: Store, places: Places, env: dict[str, str], own_ledger: Ledger, tmp_path: Path
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
    assert own_ledger.jobs.newest() == []
    assert cutfleet(*command, "3", env=env).returncode == 0
    assert cutfleet(*command, "3", "--from", "-", stdin=keys, env=env).returncode == 0
    assert cutfleet(*command, "2", "--yes", env=env).returncode == 0
    assert [job.total for job in own_ledger.jobs.newest()] == [3, 3, 3]


@pytest.mark.parametrize(("answer", "jobs"), [("n", 0), ("y", 1)])
def test_at_a_terminal_the_plan_is_shown_and_must_be_confirmed(
    stack: LocalStack, store: Store, places: Places, env: dict[str, str], own_ledger: Ledger, answer: str, jobs: int
) -> None:
    put(store, places, 3)
    command = ["submit", places.source, "--to", places.to, "--model", MODEL, "--confirm-over", "2"]
    terminal, child_end = pty.openpty()
    try:
        os.write(terminal, f"{answer}\n".encode())
        ran = subprocess.run(
            [sys.executable, "-m", "producer", *command],
            stdin=child_end,
            env=inherited_environment() | stack.environment | env,
            capture_output=True,
            text=True,
            timeout=100,
            cwd=ROOT,
            check=False,
        )
    finally:
        os.close(terminal)
        os.close(child_end)

    assert "images:    3, 3.0 kB" in ran.stderr
    assert "Submit them? [y/N]" in ran.stderr
    assert len(own_ledger.jobs.newest()) == jobs
    assert ran.returncode == (0 if jobs else 2)
    assert ("[not_confirmed]" in ran.stderr) is not bool(jobs)
