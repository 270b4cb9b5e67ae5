"""Flower as a process: each image is a task that is found by its S3 key."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.s3.client import Store
from producer.demo.local_stack import LocalStack
from tests.support.environment import Run
from tests.support.flower import Flower
from tests.support.images import sample_image
from tests.support.places import Places
from tests.support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def flower(fleet: LocalStack) -> Iterator[Flower]:
    flower = Flower(fleet)
    try:
        wait_until(flower.is_up, what="Flower answers")
        wait_until(
            lambda: any("conf" in worker for worker in flower.workers().values()),
            what="Flower has inspected the worker",
        )
        yield flower
    finally:
        flower.process.stop(timeout_s=10)


def test_an_image_is_found_by_its_key(flower: Flower, cutfleet: Run, store: Store, places: Places) -> None:
    store.put(places.key("shoes/red 1.jpg"), sample_image(), content_type="image/jpeg")
    store.put(places.key("page.jpg"), b"<html>404</html>", content_type="image/jpeg")

    job = cutfleet("submit", places.source, "--to", places.to, "--wait").stdout.strip()

    def is_final(search: str) -> bool:
        return [task["state"] in ("SUCCESS", "FAILURE") for task in flower.tasks(search)] == [True]

    done, failed = (f'args:"{places.key(name)}"' for name in ("shoes/red 1.jpg", "page.jpg"))
    wait_until(lambda: is_final(done) and is_final(failed), what="both images are final in Flower")
    (done_task,), (failed_task,) = flower.tasks(done), flower.tasks(failed)
    assert (done_task["state"], done_task["result"]) == ("SUCCESS", "'done'")
    assert (failed_task["state"], failed_task["exception"]) == ("FAILURE", "ImageFailed('not_an_image')")
    assert done_task["runtime"] > 0
    assert {done_task["uuid"], failed_task["uuid"]} == {f"{job}:0", f"{job}:1"}
    assert "lane='backfill'" in done_task["args"]
    assert len(flower.tasks(f"args:job='{job}'")) == 2
    assert done_task["name"] == failed_task["name"] == "cutfleet.image", "no key is in a metric label"
    assert str(places.key("page.jpg")) not in flower.ask("/metrics")[1]


def test_a_worker_shows_its_model_and_queues(flower: Flower) -> None:
    ((name, worker),) = flower.workers().items()

    assert name.startswith("cpu")
    assert (worker["conf"]["cutfleet_model"], worker["conf"]["cutfleet_batch_limit"]) == (
        "u2netp",
        len(os.sched_getaffinity(0)),
    )
    assert {queue["name"] for queue in worker["active_queues"]} >= {"live.u2netp", "backfill.u2netp"}


def test_flower_requires_the_login_and_is_read_only(flower: Flower) -> None:
    (worker,) = flower.workers()

    assert [flower.ask(path, login=None)[0] for path in ("/", "/tasks", "/api/tasks")] == [401] * 3
    assert flower.ask("/api/tasks", login="night-shift:guess")[0] == 401
    assert flower.ask(f"/api/worker/shutdown/{worker}", method="POST")[0] == 403
    assert flower.process.poll() is None


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({}, "FLOWER_BASIC_AUTH"),
        ({"FLOWER_BASIC_AUTH": ""}, "FLOWER_BASIC_AUTH"),
        ({"FLOWER_BASIC_AUTH": "a:b", "FLOWER_MAX_TASKS": "many"}, "many"),
    ],
)
def test_flower_does_not_start_without_a_login(variables: dict[str, str], named: str) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("FLOWER_", "CUTFLEET_"))}
    command = [sys.executable, "-m", "producer.flower"]

    ran = subprocess.run(
        command, env=env | variables, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )

    assert ran.returncode == 2
    assert named in ran.stderr
    assert "Traceback" not in ran.stderr
