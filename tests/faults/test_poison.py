"""Images that take their worker down: each is named after at most three deaths, and its neighbours are done."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from jobs.broker import lane_queue
from jobs.job import Failure
from tests.faults.fleet import Fleet, Reference, Submit, children, make_places, submit_to
from tests.faults.terms import EXHAUST, HANG, LOCK, MODEL, SEGFAULT
from tests.faults.truth import prove
from tests.support.factories import Places, put_images, sample_image, wait_until

pytestmark = pytest.mark.usefixtures("asleep")
MOST_DEATHS = 3
CROWD = 60
EXIT_STALLED, EXIT_LOCKED = 72, 1
SETTINGS = {"slots": "4", "max_pixels_mp": "10", "memory_mb": "1500"}
STALL_S = {"test_stall_s": "8"}
"""Of those that hang: shorter, and a machine that stands still for a moment is blamed on them."""


@pytest.fixture(autouse=True)
def nobody_stays(fleet: Fleet) -> Iterator[None]:
    yield
    fleet.workers.dismiss(signal.SIGKILL)


def failures(fleet: Fleet, job: str) -> list[Failure]:
    return [failure for _, failure in fleet.ledger.failures(job)]


@pytest.mark.parametrize(
    ("poison", "code", "exit_code"),
    [
        (SEGFAULT, "crashed_decoder", -signal.SIGSEGV),
        (HANG, "stalled", EXIT_STALLED),
        (EXHAUST, "memory_exhausted", EXIT_STALLED),
        (LOCK, "stalled", EXIT_LOCKED),
    ],
)
def test_an_image_that_takes_workers_down_is_named_and_its_neighbours_are_done(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, poison: bytes, code: str, exit_code: int
) -> None:
    names = put_images(fleet.store, places, 10)
    fleet.store.put(places.key(names[5]), sample_image(seed=5) + poison, content_type="image/jpeg")
    known = fleet.workers.ends()
    fleet.workers.start(supervised=True, **SETTINGS, **(STALL_S if code == "stalled" else {}))

    with fleet.dispatcher():
        job = submit()
        truth = prove(fleet, job, places, names=names, reference=reference, within_s=110)

    assert {index: state for index, state in truth.states.items() if state != "done"} == {5: "failed"}
    assert [(failure.key, failure.code) for failure in failures(fleet, job)] == [(names[5], code)]
    deaths = [code for pid, code in fleet.workers.ends().items() if pid not in known]
    assert len(deaths) <= MOST_DEATHS
    assert set(deaths) == {exit_code}
    told = fleet.run("dead", job)
    assert names[5] in told.stdout and code in told.stdout


def test_a_worker_that_is_told_to_go_takes_its_suspect_back_unconvicted(
    fleet: Fleet, places: Places, submit: Submit
) -> None:
    names = put_images(fleet.store, places, 1)
    fleet.store.put(places.key(names[0]), sample_image(seed=0) + HANG, content_type="image/jpeg")
    with fleet.dispatcher():
        job = submit()
        make_suspects(fleet, job, names)
        worker = fleet.workers.start(slots="2")
        wait_until(lambda: bool(children(worker, "spawn_main")), what="a child decodes")

        assert fleet.workers.dismiss() == [0]

        assert fleet.ledger.job(job).open == 1
        assert fleet.ledger.place(f"{job}:0") == "waiting"
        fleet.ledger.cancel(job)
        wait_until(lambda: fleet.ledger.job(job).closed is not None)


def test_a_decoder_that_is_killed_twice_convicts_its_image_and_once_does_not(
    fleet: Fleet, places: Places, submit: Submit
) -> None:
    """As the kernel does for memory."""
    names = put_images(fleet.store, places, 1)
    fleet.store.put(places.key(names[0]), sample_image(seed=0) + HANG, content_type="image/jpeg")
    with fleet.dispatcher():
        job = submit()
        make_suspects(fleet, job, names)
        worker = fleet.workers.start(slots="2", lease_s="30")
        for _ in range(2):
            wait_until(lambda: decoding(fleet, worker), what="a child decodes")
            assert fleet.ledger.job(job).failed == 0
            [child] = decoding(fleet, worker)
            os.kill(child, signal.SIGKILL)
            wait_until(lambda child=child: child not in children(worker))

        wait_until(lambda: fleet.ledger.job(job).closed is not None)

    assert [failure.code for failure in failures(fleet, job)] == ["killed"]
    assert fleet.workers.dismiss() == [0]


def test_a_suspect_does_not_wait_for_the_end_of_a_backfill_while_live_images_come(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, 1)
    crowd, few = make_places(fleet), make_places(fleet)
    put_images(fleet.store, crowd, CROWD)
    put_images(fleet.store, few, CROWD // 10)
    with fleet.dispatcher():
        job = submit()
        make_suspects(fleet, job, names)
        backfill = submit_to(fleet, crowd)
        wait_until(lambda: fleet.ledger.queue_depth(lane_queue("backfill", MODEL)) >= CROWD // 10)
        submit_to(fleet, few, "--lane", "live")
        fleet.workers.start(slots="2", test_device_ms="100")

        prove(fleet, job, places, names=names, reference=reference, alone=False)

        before, found, _ = fleet.workers.text().partition(f"claimed {job}:0\n")
        assert found
        assert before.count(f"claimed {backfill}:") < CROWD / 2
        fleet.ledger.cancel(backfill)
        wait_until(lambda: not fleet.ledger.open_jobs())


def decoding(fleet: Fleet, worker: int) -> list[int]:
    """Children of the worker that hang in an image."""
    said = fleet.workers.text()
    return [pid for pid in children(worker) if f"hangs in {pid}\n" in said]


def make_suspects(fleet: Fleet, job: str, names: list[str]) -> None:
    """As if two workers had gone down with each of these, the first of the job."""
    wait_until(lambda: fleet.ledger.job(job).window >= len(names))
    for index, name in enumerate(names):
        for _ in range(2):
            claim = fleet.ledger.claim(f"{job}:{index}", token="t", output=f"s3://x/{name}", lease_s=60, alone=True)
            fleet.ledger.vanish(claim, "somebody pulled the plug", lease_s=60)
    assert fleet.ledger.queue_depth(lane_queue("suspect", "stand-in")) >= len(names)
