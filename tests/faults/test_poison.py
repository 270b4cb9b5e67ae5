"""Images that end their worker: each fails after at most three deaths, and the other images are done."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from jobs.ledger.window import Place
from jobs.message import queue_name
from jobs.results import Failure
from tests.faults.fleet import Fleet, Reference, Submit
from tests.faults.invariants import assert_exact
from tests.faults.proc import find_children
from tests.faults.stand_in_settings import EXHAUST, HANG, LOCK, MODEL, SEGFAULT
from tests.support.images import put_images, sample_image
from tests.support.places import Places
from tests.support.waiting import wait_until
from workers.process.exit_codes import ExitCode

pytestmark = pytest.mark.usefixtures("fake_worker")
MAX_DEATHS = 3
BACKFILL_IMAGES, LIVE_IMAGES = 60, 6
EXIT_FAULTHANDLER = 1
SETTINGS = {"slots": "4", "max_pixels_mp": "10", "memory_mb": "1500"}
STALL_S = {"test_stall_s": "8"}
"""For images that hang. A shorter time would also fail other images while the whole machine is suspended."""


@pytest.fixture(autouse=True)
def _kill_workers(fleet: Fleet) -> Iterator[None]:
    yield
    fleet.workers.terminate(signal.SIGKILL)


def read_failures(fleet: Fleet, job: str) -> list[Failure]:
    return [failure for _, failure in fleet.ledger.images.failures(job)]


@pytest.mark.parametrize(
    ("poison", "code", "exit_code"),
    [
        (SEGFAULT, "crashed_decoder", -signal.SIGSEGV),
        (HANG, "stalled", ExitCode.STALLED),
        (EXHAUST, "memory_exhausted", ExitCode.STALLED),
        (LOCK, "stalled", EXIT_FAULTHANDLER),
    ],
    ids=["segfault", "hang", "exhaust", "lock"],
)
def test_an_image_that_ends_its_workers_fails_and_the_others_are_done(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, poison: bytes, code: str, exit_code: int
) -> None:
    names = put_images(fleet.store, places, 10)
    fleet.store.put(places.key(names[5]), sample_image(seed=5) + poison, content_type="image/jpeg")
    earlier = fleet.workers.exit_codes()
    fleet.workers.start_supervised(**SETTINGS, **(STALL_S if code == "stalled" else {}))

    with fleet.dispatcher():
        job = submit()
        outcome = assert_exact(fleet, job, places, names=names, reference=reference, within_s=110)

    assert {index: state for index, state in outcome.states.items() if state != "done"} == {5: "failed"}
    assert [(failure.key, failure.code) for failure in read_failures(fleet, job)] == [(names[5], code)]
    deaths = [code for pid, code in fleet.workers.exit_codes().items() if pid not in earlier]
    assert len(deaths) <= MAX_DEATHS
    assert set(deaths) == {exit_code}
    listed = fleet.run("dead", job).stdout
    assert names[5] in listed and code in listed


def test_a_worker_that_drains_releases_its_suspect(fleet: Fleet, places: Places, submit: Submit) -> None:
    names = put_images(fleet.store, places, 1)
    fleet.store.put(places.key(names[0]), sample_image(seed=0) + HANG, content_type="image/jpeg")
    with fleet.dispatcher():
        job = submit()
        make_suspects(fleet, job, names)
        worker = fleet.workers.start(slots="2")
        wait_until(lambda: find_children(worker, "spawn_main"), what="a subprocess decodes")

        assert fleet.workers.terminate() == [0]

        assert fleet.ledger.jobs.get(job).open == 1
        assert fleet.ledger.window.place(f"{job}:0") is Place.WAITING
        fleet.ledger.jobs.cancel(job)
        wait_until(lambda: fleet.ledger.jobs.get(job).closed is not None)


def test_an_image_fails_when_its_decode_subprocess_is_killed_twice_but_not_once(
    fleet: Fleet, places: Places, submit: Submit
) -> None:
    """As by the OOM killer."""
    names = put_images(fleet.store, places, 1)
    fleet.store.put(places.key(names[0]), sample_image(seed=0) + HANG, content_type="image/jpeg")
    with fleet.dispatcher():
        job = submit()
        make_suspects(fleet, job, names)
        worker = fleet.workers.start(slots="2", lease_s="30")
        for _ in range(2):
            wait_until(lambda: find_decoding(fleet, worker), what="a subprocess decodes")
            assert fleet.ledger.jobs.get(job).failed == 0
            kill_subprocess(fleet, worker)

        wait_until(lambda: fleet.ledger.jobs.get(job).closed is not None)

    assert [failure.code for failure in read_failures(fleet, job)] == ["killed"]
    assert fleet.workers.terminate() == [0]


def test_a_suspect_runs_before_the_end_of_a_backfill_although_live_images_come(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, 1)
    many, few = fleet.create_places(), fleet.create_places()
    put_images(fleet.store, many, BACKFILL_IMAGES)
    put_images(fleet.store, few, LIVE_IMAGES)
    with fleet.dispatcher():
        job = submit()
        make_suspects(fleet, job, names)
        backfill = fleet.submit(many)
        wait_until(lambda: fleet.ledger.window.queue_length(queue_name("backfill", MODEL)) >= LIVE_IMAGES)
        fleet.submit(few, "--lane", "live")
        fleet.workers.start(slots="2", test_device_ms="100")

        assert_exact(fleet, job, places, names=names, reference=reference, only_job=False)

        log_before, is_claimed, _ = fleet.workers.log_text().partition(f"claimed {job}:0\n")
        assert is_claimed
        assert log_before.count(f"claimed {backfill}:") < BACKFILL_IMAGES / 2
        fleet.ledger.jobs.cancel(backfill)
        wait_until(lambda: not fleet.ledger.jobs.open())


def find_decoding(fleet: Fleet, worker: int) -> list[int]:
    """Return the subprocesses of the worker that hang in an image."""
    log = fleet.workers.log_text()
    return [pid for pid in find_children(worker) if f"hangs in {pid}\n" in log]


def kill_subprocess(fleet: Fleet, worker: int) -> None:
    [decoding] = find_decoding(fleet, worker)
    os.kill(decoding, signal.SIGKILL)
    wait_until(lambda: decoding not in find_children(worker), what="the subprocess has ended")


def make_suspects(fleet: Fleet, job: str, names: list[str]) -> None:
    """Make the first images of the job suspects, as if two workers had died with each. `names`: of these images."""
    wait_until(lambda: fleet.ledger.jobs.get(job).window >= len(names))
    window = fleet.ledger.window
    for index, name in enumerate(names):
        for _ in range(2):
            claim = window.claim(f"{job}:{index}", token="t", output=f"s3://x/{name}", lease_s=60, isolated=True)
            window.report_crash(claim, "power failure", lease_s=60)
    assert window.queue_length(queue_name("suspect", MODEL)) >= len(names)
