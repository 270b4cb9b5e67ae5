"""Flower in a browser: images are found by key, job and lane; it is read-only, and keeps no more than it may."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from tests.faults.fleet import UNHURRIED_S, Fleet, submit_here
from tests.support.factories import Places, put_images, wait_until
from tests.support.flower import Flower, Pages, opened

IMAGES, LIVE, KEPT = 150, 12, 100


@pytest.fixture
def flower(fleet: Fleet) -> Iterator[Flower]:
    flower = Flower(fleet.stack, f"--max_tasks={KEPT}")
    wait_until(flower.is_up, what="Flower answers")
    yield flower
    flower.process.stop(timeout_s=10)


def test_what_a_person_sees_in_flower(fleet: Fleet, places: Places, flower: Flower, browser: Browser) -> None:
    names = put_images(fleet.store, places, IMAGES + LIVE)
    node = f"cpu{os.getpid()}"  # another run of these tests may be on this machine
    fleet.workers.start(node=node, slots="8", batch_limit="4", test_device_ms="20", lease_s=UNHURRIED_S)
    wait_until(lambda: bool(flower.workers()), what="Flower knows the worker")
    with fleet.dispatcher(), opened(flower, browser) as pages:
        keys = [places.key(name).key for name in names]
        shelf = submit_here(fleet, places, *keys[:IMAGES], lane="backfill")
        wait_until(lambda: fleet.ledger.job(shelf).closed is not None, what="the backfill is done")
        live = submit_here(fleet, places, *keys[IMAGES:], lane="live")
        wait_until(lambda: len(flower.tasks("state:SUCCESS lane='live'")) == LIVE, what="Flower saw the last")
        (worker,) = seen_in_the_end(pages, fleet)
        last = str(places.key(names[-1]))
        by_key, by_job, by_lane, gone = (
            pages.search(text)
            for text in (f'args:"{last}"', f"args:job='{live}'", "args:lane='live'", f"args:{shelf}:0")
        )
        page = pages.worker(worker["Worker"])
        kept = len(flower.tasks("cutfleet.image"))

    assert worker["Worker"].startswith(f"{node}-stand-in-float32-b4@")
    (row,) = by_key
    assert row["state"] == "SUCCESS"
    assert f"{live}:{LIVE - 1}" in row["uuid"]
    assert last in row["args"]
    number, unit = row["runtime"].split()
    assert float(number) / {"ms": 1000, "s": 1}[unit] >= logged_s(fleet, live, LIVE - 1) - 0.005, (
        "it shows two decimals"
    )
    assert len(by_job) == len(by_lane) == LIVE
    assert all(f"{live}:" in row["uuid"] for row in (*by_job, *by_lane))
    assert gone == []
    assert kept == KEPT, "what is older is forgotten, and so is its memory"
    assert not re.search(r"Shut down|Restart pool|Add consumer", page, re.I), "read-only"
    with browser.new_context() as stranger:
        answer = stranger.request.get(f"{flower.url}/tasks")
        assert answer.status == 401


def seen_in_the_end(pages: Pages, fleet: Fleet) -> list[dict[str, str]]:
    """The rows of Flower's page of workers: one that is online, which took every message."""
    rows: list[dict[str, str]] = []

    def saw_all() -> bool:
        rows[:] = pages.workers()
        return [(row["Status"], int(row["Processed"])) for row in rows] == [("Online", answered(fleet))]

    wait_until(saw_all, what="Flower saw all")
    return rows


def answered(fleet: Fleet) -> int:
    """Messages that the worker took: all images, and under load one of them a second time."""
    found = len(re.findall(r"^(?:claimed|refused) ", fleet.workers.text(), re.MULTILINE))
    assert found >= IMAGES + LIVE
    return found


def logged_s(fleet: Fleet, job: str, index: int) -> float:
    """How long the worker says that it had the image."""
    (found,) = re.findall(rf"action=image job={job} image={index} .*?seconds=([\d.]+)", fleet.workers.text())
    return float(found)
