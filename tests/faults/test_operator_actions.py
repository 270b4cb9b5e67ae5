"""A person cancels, pauses, tunes or retries a job while workers die: states and counts are exact."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest

from producer.dispatcher.feeder import MIN_WINDOW
from tests.faults.fleet import Fleet, Reference, Submit
from tests.faults.invariants import assert_exact
from tests.faults.processes import LONG_LEASE_S
from tests.faults.stand_in_settings import MODEL
from tests.support.images import put_images, sample_image
from tests.support.places import Places
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("fake_worker")


def test_a_job_that_is_cancelled_at_a_third_finishes_the_images_in_work_and_nothing_else(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, tmp_path: Path
) -> None:
    """A worker that dies before it published anything leaves nothing; the next test covers one that did."""
    names = put_images(fleet.store, places, 60)
    fleet.workers.start(test_device_ms="100", lease_s=LONG_LEASE_S)
    dying = fleet.workers.start(test_device_ms="100", test_failpoints=f"after_model={tmp_path / 'killed'}")
    with fleet.dispatcher():
        job = submit()
        assert fleet.workers.wait_for(dying) == -signal.SIGKILL
        wait_until(lambda: fleet.ledger.jobs.get(job).done >= 18)
        assert fleet.ledger.jobs.cancel(job)  # as `cutfleet cancel`, but without its start-up time

        outcome = assert_exact(fleet, job, places, names=names, reference=reference)

    assert outcome.counts["cancelled"] > 0
    assert outcome.counts["done"] + outcome.counts["cancelled"] == 60
    assert fleet.workers.terminate() == [0]


@pytest.mark.parametrize(("point", "left"), [("after_mask", ["mask"]), ("before_commit", ["mask", "cutout"])])
def test_audit_names_what_a_killed_worker_left_of_a_cancelled_image_and_the_next_job_completes_it(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, tmp_path: Path, point: str, left: list[str]
) -> None:
    """A cancelled image is not made again, and nothing is ever deleted."""
    [name] = put_images(fleet.store, places, 1)
    worker = fleet.workers.start(test_failpoints=f"{point}={tmp_path / point}")
    with fleet.dispatcher():
        job = submit()
        fleet.workers.wait_for(worker)
        assert fleet.ledger.jobs.cancel(job)
        wait_until(lambda: fleet.ledger.jobs.get(job).closed is not None, what="the job is closed")
        audited = fleet.run("audit", job, "--json")
        again = submit()
        fleet.workers.start()
        outcome = assert_exact(fleet, again, places, names=[name], reference=reference)

    assert fleet.ledger.jobs.get(job).cancelled_images == 1
    assert audited.returncode == 1, audited.stderr
    found = [json.loads(line) for line in audited.stdout.splitlines()]
    assert [(row["code"], row["key"]) for row in found] == [("cancelled_left", name)] * len(left)
    locations = {"mask": str(places.mask(name)), "cutout": str(places.cutout(name))}
    assert [row["what"].partition(",")[0] for row in found] == [locations[output] for output in left]
    assert outcome.counts["total"] == 1
    assert fleet.workers.terminate() == [0]


def test_a_paused_job_finishes_what_is_fed_and_closes_after_the_rest(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, MIN_WINDOW + 16)
    with fleet.dispatcher():
        job = submit()
        wait_until(lambda: fleet.ledger.jobs.get(job).cursor == MIN_WINDOW)
        assert fleet.run("pause", job).returncode == 0
        worker = fleet.workers.start()
        wait_until(lambda: fleet.ledger.jobs.get(job).done == MIN_WINDOW)
        fleet.wait_for_turns(3)
        paused = fleet.ledger.jobs.get(job)
        assert (paused.cursor, paused.closed) == (MIN_WINDOW, None)
        fleet.workers.kill(worker)
        assert fleet.run("unpause", job).returncode == 0
        fleet.workers.start()

        outcome = assert_exact(fleet, job, places, names=names, reference=reference)

    assert outcome.counts["done"] == len(names)
    assert fleet.workers.terminate() == [0]


def test_a_job_that_is_moved_to_the_live_lane_overtakes_an_earlier_one(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, MIN_WINDOW + 16)
    few = names[:6]
    urgent = Places(places.source, f"{places.to}urgent/")
    with fleet.dispatcher(lease_s=LONG_LEASE_S):
        first = submit()
        wait_until(lambda: fleet.ledger.jobs.get(first).cursor == MIN_WINDOW, what="the queue is full")
        keys = [places.key(name).key for name in few]
        ran = fleet.run("submit", places.source, *keys, "--to", urgent.to, "--model", MODEL)
        second = ran.stdout.strip()
        fleet.wait_for_turns(2)
        assert fleet.ledger.jobs.get(second).cursor == 0
        assert fleet.run("tune", second, "--lane", "live").returncode == 0
        wait_until(lambda: fleet.ledger.jobs.get(second).cursor == len(few))
        fleet.workers.start(slots="1", lease_s=LONG_LEASE_S)
        wait_until(lambda: all(fleet.ledger.jobs.get(job).closed for job in (first, second)), what="both are closed")

    claimed = re.findall(rf"^claimed ({first}|{second}):", fleet.workers.log_text(), re.M)
    assert claimed == [second] * len(few) + [first] * len(names)
    assert [fleet.ledger.jobs.get(job).done for job in (first, second)] == [len(names), len(few)]
    assert fleet.workers.terminate() == [0]


def test_failures_with_corrected_sources_are_done_after_a_retry_though_their_worker_dies(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, tmp_path: Path
) -> None:
    names = put_images(fleet.store, places, 8)
    for name in names[:3]:
        fleet.store.put(places.key(name), b"<html>404</html>", content_type="image/jpeg")
    with fleet.dispatcher():
        job = submit()
        fleet.workers.start()
        failed = assert_exact(fleet, job, places, names=names, reference=reference)
        assert (failed.counts["failed"], failed.counts["done"]) == (3, 5)
        fleet.workers.terminate()
        for seed, name in enumerate(names[:3]):
            fleet.store.put(places.key(name), sample_image(seed=seed), content_type="image/jpeg")
        assert fleet.run("retry", job).returncode == 0
        worker = fleet.workers.start_supervised(test_failpoints=f"before_commit={tmp_path / 'killed'}")
        assert fleet.workers.wait_for(worker) == -signal.SIGKILL

        outcome = assert_exact(fleet, job, places, names=names, reference=reference)

    assert outcome.counts["done"] == 8
    assert not list(fleet.ledger.images.failures(job))
    assert fleet.workers.terminate() == [0]
