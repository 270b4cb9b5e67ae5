"""The device fails or hangs: the process ends and another goes on; who broke it twice is named."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.faults.fleet import Fleet, Reference, Submit, children, is_stopped
from tests.faults.terms import DEVICE_GREY, DEVICE_HANGS, DEVICE_SEGFAULT
from tests.faults.truth import prove
from tests.support.factories import Places, put_images, wait_until

EXIT_DEVICE_LOST = 70
MOST_DEATHS = 3


@pytest.fixture(autouse=True)
def nobody_stays(fleet: Fleet) -> Iterator[None]:
    yield
    fleet.workers.dismiss(signal.SIGKILL)


def grey(level: int) -> bytes:
    body = io.BytesIO()
    Image.new("RGB", (160, 120), (level, level, level)).save(body, "PNG")
    return body.getvalue()


@pytest.mark.parametrize(("level", "words"), [(DEVICE_GREY, "illegal memory access"), (DEVICE_HANGS, "no progress")])
def test_the_same_fault_of_the_device_again_convicts_the_image_and_no_other_of_its_batch(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, level: int, words: str
) -> None:
    names = put_images(fleet.store, places, 10)
    fleet.store.put(places.key(names[4]), grey(level), content_type="image/png")
    known = fleet.workers.ends()
    fleet.workers.start(supervised=True, slots="6", batch_limit="4", test_stall_s="8", test_device_ms="20", lease_s="5")

    with fleet.dispatcher():
        job = submit()
        truth = prove(fleet, job, places, names=names, reference=reference, within_s=200)

    assert {index: state for index, state in truth.states.items() if state != "done"} == {4: "failed"}
    [(_, failure)] = fleet.ledger.failures(job)
    assert failure.code == "crashed_device"
    assert words in failure.message
    deaths = [code for pid, code in fleet.workers.ends().items() if pid not in known]
    assert 2 <= len(deaths) <= MOST_DEATHS
    assert set(deaths) == {EXIT_DEVICE_LOST}


def test_an_image_on_which_the_device_library_crashes_is_named_after_three_deaths(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    """Two last words make it a suspect, the third, alone, convicts it."""
    names = put_images(fleet.store, places, 6)
    fleet.store.put(places.key(names[2]), grey(DEVICE_SEGFAULT), content_type="image/png")
    known = fleet.workers.ends()
    fleet.workers.start(supervised=True, slots="4", batch_limit="4", lease_s="5")

    with fleet.dispatcher():
        job = submit()
        truth = prove(fleet, job, places, names=names, reference=reference, within_s=200)

    assert {index: state for index, state in truth.states.items() if state != "done"} == {2: "failed"}
    [(_, failure)] = fleet.ledger.failures(job)
    assert failure.code == "crashed_worker"
    deaths = [code for pid, code in fleet.workers.ends().items() if pid not in known]
    assert deaths == [-signal.SIGSEGV] * MOST_DEATHS
    assert "Fatal Python error: Segmentation fault" in fleet.workers.text()


def test_a_worker_that_crashes_stays_until_the_ledger_knows_whom_to_blame(
    fleet: Fleet, places: Places, submit: Submit, tmp_path: Path
) -> None:
    """As the first process of a container, it takes the one that tells the ledger with it."""
    names = put_images(fleet.store, places, 1)
    fleet.store.put(places.key(names[0]), grey(DEVICE_SEGFAULT), content_type="image/png")
    flag = tmp_path / "frozen"
    worker = fleet.workers.start(test_freezepoints=f"before_blame={flag}")

    with fleet.dispatcher():
        job = submit()
        wait_until(flag.exists, what="somebody is about to blame the image")
        [listener] = children(worker)
        wait_until(lambda: is_stopped(listener))
        fleet.let_dispatcher_turn(5)
        assert worker not in fleet.workers.ends()
        os.kill(listener, signal.SIGCONT)
        assert fleet.workers.wait_for(worker) == -signal.SIGSEGV

        wait_until(lambda: fleet.ledger.place(f"{job}:0") == "waiting", what="it is given back at once")
        fleet.ledger.cancel(job)
        wait_until(lambda: fleet.ledger.job(job).closed is not None)
