"""The device fails, hangs or crashes: the process ends, its supervisor starts another, and an image that causes the
same fault again fails."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from jobs.ledger.window import Place
from tests.faults.fleet import Fleet, Reference, Submit
from tests.faults.invariants import assert_exact
from tests.faults.proc import find_children, is_stopped
from tests.faults.stand_in_settings import DEVICE_GREY, DEVICE_HANGS, DEVICE_SEGFAULT
from tests.support.images import put_images
from tests.support.places import Places
from tests.support.waiting import wait_until
from workers.process.exit_codes import ExitCode

MAX_DEATHS = 3


@pytest.fixture(autouse=True)
def _kill_workers(fleet: Fleet) -> Iterator[None]:
    yield
    fleet.workers.terminate(signal.SIGKILL)


def grey_image(level: int) -> bytes:
    body = io.BytesIO()
    Image.new("RGB", (160, 120), (level, level, level)).save(body, "PNG")
    return body.getvalue()


@pytest.mark.parametrize(
    ("level", "words"),
    [(DEVICE_GREY, "illegal memory access"), (DEVICE_HANGS, "no progress")],
    ids=["fails", "hangs"],
)
def test_an_image_that_causes_the_same_device_fault_again_fails_and_no_other_of_its_batch(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, level: int, words: str
) -> None:
    names = put_images(fleet.store, places, 10)
    fleet.store.put(places.key(names[4]), grey_image(level), content_type="image/png")
    earlier = fleet.workers.exit_codes()
    fleet.workers.start_supervised(slots="6", batch_limit="4", test_stall_s="8", test_device_ms="20", lease_s="5")

    with fleet.dispatcher():
        job = submit()
        outcome = assert_exact(fleet, job, places, names=names, reference=reference, within_s=200)

    assert {index: state for index, state in outcome.states.items() if state != "done"} == {4: "failed"}
    [(_, failure)] = fleet.ledger.images.failures(job)
    assert failure.code == "crashed_device"
    assert words in failure.message
    deaths = [code for pid, code in fleet.workers.exit_codes().items() if pid not in earlier]
    assert 2 <= len(deaths) <= MAX_DEATHS
    assert set(deaths) == {ExitCode.DEVICE_LOST}


def test_an_image_that_crashes_the_devices_library_fails_after_three_deaths(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    """Two crash reports make it a suspect. The third, in isolation, fails it."""
    names = put_images(fleet.store, places, 6)
    fleet.store.put(places.key(names[2]), grey_image(DEVICE_SEGFAULT), content_type="image/png")
    earlier = fleet.workers.exit_codes()
    fleet.workers.start_supervised(slots="4", batch_limit="4", lease_s="5")

    with fleet.dispatcher():
        job = submit()
        outcome = assert_exact(fleet, job, places, names=names, reference=reference, within_s=200)

    assert {index: state for index, state in outcome.states.items() if state != "done"} == {2: "failed"}
    [(_, failure)] = fleet.ledger.images.failures(job)
    assert failure.code == "crashed_worker"
    deaths = [code for pid, code in fleet.workers.exit_codes().items() if pid not in earlier]
    assert deaths == [-signal.SIGSEGV] * MAX_DEATHS
    assert "Fatal Python error: Segmentation fault" in fleet.workers.log_text()


def test_a_worker_that_crashes_does_not_end_before_the_ledger_has_the_report(
    fleet: Fleet, places: Places, submit: Submit, tmp_path: Path
) -> None:
    """As the first process of a container, it would end the listener with it."""
    names = put_images(fleet.store, places, 1)
    fleet.store.put(places.key(names[0]), grey_image(DEVICE_SEGFAULT), content_type="image/png")
    flag = tmp_path / "frozen"
    worker = fleet.workers.start(test_freezepoints=f"before_blame={flag}")

    with fleet.dispatcher():
        job = submit()
        wait_until(flag.exists, what="the listener is about to report the image")
        [listener] = find_children(worker)
        wait_until(lambda: is_stopped(listener))
        fleet.wait_for_turns(5)
        assert worker not in fleet.workers.exit_codes()
        os.kill(listener, signal.SIGCONT)
        assert fleet.workers.wait_for(worker) == -signal.SIGSEGV

        wait_until(lambda: fleet.ledger.window.place(f"{job}:0") is Place.WAITING, what="the image is requeued at once")
        fleet.ledger.jobs.cancel(job)
        wait_until(lambda: fleet.ledger.jobs.get(job).closed is not None)
