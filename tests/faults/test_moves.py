"""A person cancels, pauses, speeds up or repeats a job, and workers die meanwhile: states and counts are exact."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest

from producer.dispatcher.feeder import MIN_WINDOW
from tests.faults.fleet import UNHURRIED_S, Fleet, Reference, Submit
from tests.faults.terms import MODEL
from tests.faults.truth import prove
from tests.support.factories import Places, put_images, sample_image, wait_until

pytestmark = pytest.mark.usefixtures("asleep")


def test_cancelled_at_a_third_a_job_ends_what_is_in_work_and_nothing_else(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, tmp_path: Path
) -> None:
    """One worker dies before that, with nothing published: what it would leave else is the next test's."""
    names = put_images(fleet.store, places, 60)
    fleet.workers.start(test_device_ms="100", lease_s=UNHURRIED_S)
    leaving = fleet.workers.start(test_device_ms="100", test_failpoints=f"after_model={tmp_path / 'killed'}")
    with fleet.dispatcher():
        job = submit()
        assert fleet.workers.wait_for(leaving) == -signal.SIGKILL
        wait_until(lambda: fleet.ledger.job(job).done >= 18)
        assert fleet.ledger.cancel(job)  # what `cutfleet cancel` does, at once

        truth = prove(fleet, job, places, names=names, reference=reference)

    assert truth.counts["cancelled"] > 0
    assert truth.counts["done"] + truth.counts["cancelled"] == 60
    assert fleet.workers.dismiss() == [0]


@pytest.mark.parametrize(("place", "left"), [("after_mask", ["mask"]), ("before_commit", ["mask", "cutout"])])
def test_what_a_worker_that_dies_leaves_of_a_cancelled_image_is_named_and_made_whole_by_the_next_job(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, tmp_path: Path, place: str, left: list[str]
) -> None:
    """Cancelled, it is nobody's to do again, and nothing is ever deleted."""
    [name] = put_images(fleet.store, places, 1)
    worker = fleet.workers.start(test_failpoints=f"{place}={tmp_path / place}")
    with fleet.dispatcher():
        job = submit()
        fleet.workers.wait_for(worker)
        assert fleet.ledger.cancel(job)
        wait_until(lambda: fleet.ledger.job(job).closed is not None, what="the job is closed")
        looked = fleet.run("audit", job, "--json")
        again = submit()
        fleet.workers.start()
        truth = prove(fleet, again, places, names=[name], reference=reference)

    assert fleet.ledger.job(job).cancelled_images == 1
    assert looked.returncode == 1, looked.stderr
    found = [json.loads(line) for line in looked.stdout.splitlines()]
    assert [(row["code"], row["key"]) for row in found] == [("cancelled_left", name)] * len(left)
    where = {"mask": str(places.mask(name)), "cutout": str(places.cutout(name))}
    assert [row["what"].partition(",")[0] for row in found] == [where[kind] for kind in left]
    assert truth.counts["total"] == 1
    assert fleet.workers.dismiss() == [0]


def test_paused_a_job_ends_what_is_fed_and_is_closed_only_after_the_rest(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, MIN_WINDOW + 16)
    with fleet.dispatcher():
        job = submit()
        wait_until(lambda: fleet.ledger.job(job).cursor == MIN_WINDOW)
        assert fleet.run("pause", job).returncode == 0
        worker = fleet.workers.start()
        wait_until(lambda: fleet.ledger.job(job).done == MIN_WINDOW)
        fleet.let_dispatcher_turn(3)
        paused = fleet.ledger.job(job)
        assert (paused.cursor, paused.closed) == (MIN_WINDOW, None)
        fleet.workers.kill(worker)
        assert fleet.run("unpause", job).returncode == 0
        fleet.workers.start()

        truth = prove(fleet, job, places, names=names, reference=reference)

    assert truth.counts["done"] == len(names)
    assert fleet.workers.dismiss() == [0]


def test_moved_to_the_live_lane_a_job_overtakes_what_was_there_before(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, MIN_WINDOW + 16)
    few = names[:6]
    urgent = Places(places.source, f"{places.to}urgent/")
    with fleet.dispatcher(lease_s=UNHURRIED_S):
        first = submit()
        wait_until(lambda: fleet.ledger.job(first).cursor == MIN_WINDOW, what="the queue is full")
        keys = [places.key(name).key for name in few]
        ran = fleet.run("submit", places.source, *keys, "--to", urgent.to, "--model", MODEL)
        second = ran.stdout.strip()
        fleet.let_dispatcher_turn(2)
        assert fleet.ledger.job(second).cursor == 0
        assert fleet.run("tune", second, "--lane", "live").returncode == 0
        wait_until(lambda: fleet.ledger.job(second).cursor == len(few))
        fleet.workers.start(slots="1", lease_s=UNHURRIED_S)
        wait_until(lambda: fleet.ledger.job(second).closed is not None and fleet.ledger.job(first).closed is not None)

    claimed = re.findall(rf"^claimed ({first}|{second}):", fleet.workers.text(), re.M)
    assert claimed == [second] * len(few) + [first] * len(names)
    assert [fleet.ledger.job(job).done for job in (first, second)] == [len(names), len(few)]
    assert fleet.workers.dismiss() == [0]


def test_failures_that_are_mended_and_tried_again_are_done_though_their_worker_dies(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, tmp_path: Path
) -> None:
    names = put_images(fleet.store, places, 8)
    for name in names[:3]:
        fleet.store.put(places.key(name), b"<html>404</html>", content_type="image/jpeg")
    with fleet.dispatcher():
        job = submit()
        fleet.workers.start()
        failed = prove(fleet, job, places, names=names, reference=reference)
        assert (failed.counts["failed"], failed.counts["done"]) == (3, 5)
        fleet.workers.dismiss()
        for seed, name in enumerate(names[:3]):
            fleet.store.put(places.key(name), sample_image(seed=seed), content_type="image/jpeg")
        assert fleet.run("retry", job).returncode == 0
        worker = fleet.workers.start(supervised=True, test_failpoints=f"before_commit={tmp_path / 'killed'}")
        assert fleet.workers.wait_for(worker) == -signal.SIGKILL

        truth = prove(fleet, job, places, names=names, reference=reference)

    assert truth.counts["done"] == 8
    assert not list(fleet.ledger.failures(job))
    assert fleet.workers.dismiss() == [0]
