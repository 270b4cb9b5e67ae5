"""Flower in a browser: images are found by key, job and lane; it is read-only and limits its memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.faults.fleet import Fleet
from tests.faults.fork_server import ForkServer
from tests.faults.processes import LONG_LEASE_S
from tests.support.flower import Flower, Pages, open_pages
from tests.support.images import put_images
from tests.support.waiting import wait_until

IMAGES, LIVE, KEPT = 150, 12, 100


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    fork_server = ForkServer(tmp_path)
    with Fleet(tmp_path / "fleet", fork_server) as fleet:
        yield fleet
    fork_server.stop()


@pytest.fixture
def flower(fleet: Fleet) -> Iterator[Flower]:
    flower = Flower(fleet.stack, f"--max_tasks={KEPT}")
    wait_until(flower.is_up, what="Flower answers")
    yield flower
    flower.process.stop(timeout_s=10)


def test_flower_finds_images_and_shows_the_worker(fleet: Fleet, flower: Flower, browser: Browser) -> None:
    places = fleet.create_places()
    names = put_images(fleet.store, places, IMAGES + LIVE)
    node = f"cpu{os.getpid()}"  # another run of these tests may be on this machine
    fleet.workers.start(node=node, slots="8", batch_limit="4", test_device_ms="20", lease_s=LONG_LEASE_S)
    wait_until(lambda: bool(flower.workers()), what="Flower has inspected the worker")
    with fleet.dispatcher(), open_pages(flower, browser) as pages:
        keys = [places.key(name).key for name in names]
        backfill = fleet.submit_in_process(places, *keys[:IMAGES], lane="backfill")
        wait_until(lambda: fleet.ledger.jobs.get(backfill).closed is not None, what="the backfill is done")
        live = fleet.submit_in_process(places, *keys[IMAGES:], lane="live")
        wait_until(lambda: len(flower.tasks("state:SUCCESS lane='live'")) == LIVE, what="Flower has the last event")
        (worker,) = wait_for_all_messages(pages, fleet)
        last = str(places.key(names[-1]))
        by_key, by_job, by_lane, gone = (
            pages.search(text)
            for text in (f'args:"{last}"', f"args:job='{live}'", "args:lane='live'", f"args:{backfill}:0")
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
    assert kept == KEPT, "Flower forgets older tasks"
    assert not re.search(r"Shut down|Restart pool|Add consumer", page, re.I), "read-only"
    with browser.new_context() as stranger:
        answer = stranger.request.get(f"{flower.url}/tasks")
        assert answer.status == 401


def wait_for_all_messages(pages: Pages, fleet: Fleet) -> list[dict[str, str]]:
    """Return the rows of Flower's workers page once it shows one online worker that processed every message."""
    rows: list[dict[str, str]] = []

    def has_all() -> bool:
        rows[:] = pages.workers()
        return [(row["Status"], int(row["Processed"])) for row in rows] == [("Online", processed(fleet))]

    wait_until(has_all, what="Flower has all events")
    return rows


def processed(fleet: Fleet) -> int:
    """Return the number of messages that the worker took: one for each image, and under load some duplicates."""
    count = len(re.findall(r"^(?:claimed|refused) ", fleet.workers.log_text(), re.MULTILINE))
    assert count >= IMAGES + LIVE
    return count


def logged_s(fleet: Fleet, job: str, index: int) -> float:
    """Return the seconds that the worker logged for an image."""
    (seconds,) = re.findall(rf"action=image job={job} image={index} .*?seconds=([\d.]+)", fleet.workers.log_text())
    return float(seconds)
