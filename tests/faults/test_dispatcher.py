"""Dispatchers and submissions are killed and frozen, and run two at a time: no image is lost, fed twice or listed
twice."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.faults.fleet import IMAGES, Fleet, Reference, Submit
from tests.faults.invariants import assert_exact
from tests.faults.proc import is_stopped
from tests.faults.stand_in_settings import MODEL
from tests.support.images import put_images, sample_image
from tests.support.places import Places, delete_object
from tests.support.waiting import wait_until

EXIT_USAGE = 2
FAILPOINTS = ("before_feed", "after_feed", "after_report", "before_close_job", "after_close_job")


def test_a_dispatcher_that_is_killed_at_each_step_loses_no_image(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, tmp_path: Path
) -> None:
    names = put_images(fleet.store, places, IMAGES)
    fleet.workers.start()
    flags = {point: tmp_path / point for point in FAILPOINTS}
    with fleet.dispatcher(test_failpoints=",".join(f"{point}={flag}" for point, flag in flags.items())):
        job = submit()
        outcome = assert_exact(fleet, job, places, names=names, reference=reference)
        wait_until(lambda: all(flag.exists() for flag in flags.values()))

    assert outcome.counts["done"] == IMAGES
    assert set(fleet.workers.publish_counts(places).values()) == {1}
    assert list(fleet.dispatchers.exit_codes().values()).count(-signal.SIGKILL) == len(FAILPOINTS)


def test_one_of_two_dispatchers_is_active_and_one_that_wakes_without_the_lock_changes_nothing(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, IMAGES)
    fleet.workers.start(test_device_ms="100")
    before = fleet.active_epoch()
    with fleet.dispatcher() as first:
        wait_until(lambda: fleet.active_epoch() > before, what="the first is active before the second starts")
        job = submit()
        wait_until(lambda: fleet.ledger.jobs.get(job).done > 2)
        epoch = fleet.active_epoch()
        os.kill(first, signal.SIGSTOP)
        with fleet.dispatcher():
            wait_until(lambda: fleet.active_epoch() > epoch)
            os.kill(first, signal.SIGCONT)

            outcome = assert_exact(fleet, job, places, names=names, reference=reference)

    assert outcome.counts["done"] == IMAGES
    assert set(fleet.workers.publish_counts(places).values()) == {1}


def test_a_dispatcher_that_was_suspended_with_its_workers_lets_them_renew_first(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    """As on a suspended machine where the dispatcher is resumed first."""
    lease_s = 5
    names = put_images(fleet.store, places, 2)
    worker = fleet.workers.start(test_device_ms="4000", slots="2", lease_s=str(lease_s))
    with fleet.dispatcher(lease_s=str(lease_s)) as dispatcher:
        job = submit()
        wait_until(lambda: fleet.workers.claim_counts(job).total() == 2, what="the worker has claimed both images")
        for pid in (dispatcher, worker):
            os.kill(pid, signal.SIGSTOP)
        since = fleet.ledger.server_time_s()
        wait_until(lambda: fleet.ledger.server_time_s() > since + lease_s + 1, what="the leases have expired")
        os.kill(dispatcher, signal.SIGCONT)
        fleet.wait_for_turns(3)
        os.kill(worker, signal.SIGCONT)

        outcome = assert_exact(fleet, job, places, names=names, reference=reference)

    assert outcome.counts["done"] == 2
    assert set(fleet.workers.claim_counts(job).values()) == {1}


@pytest.mark.parametrize("point", ["before_create_job", "before_add_part", "after_add_part"])
def test_a_submission_that_is_killed_around_a_part_is_resumed_or_repeated(
    fleet: Fleet, places: Places, reference: Reference, tmp_path: Path, point: str
) -> None:
    names = put_images(fleet.store, places, 8)
    before = {job.id for job in fleet.ledger.jobs.newest()}
    fleet.workers.start()
    killed = fleet.submissions.start_for(places, test_failpoints=f"{point}={tmp_path / point}")
    assert fleet.submissions.wait_for(killed) == -signal.SIGKILL
    with fleet.dispatcher():
        begun = [job.id for job in fleet.ledger.jobs.newest() if job.id not in before]
        options = ("--resume", begun[0]) if begun else ()
        ran = fleet.run("submit", places.source, "--to", places.to, "--model", MODEL, *options)
        assert ran.returncode == 0, ran.stderr

        outcome = assert_exact(fleet, ran.stdout.strip(), places, names=names, reference=reference)

    assert outcome.counts["done"] == 8
    assert set(fleet.workers.publish_counts(places).values()) == {1}


def test_a_submission_that_wakes_after_another_listed_its_job_changes_no_part_of_the_manifest(
    fleet: Fleet, places: Places, reference: Reference, tmp_path: Path
) -> None:
    """The two list different images: a new first key was added in between."""
    names = put_images(fleet.store, places, 20)
    before = {job.id for job in fleet.ledger.jobs.newest()}
    fleet.workers.start()
    freezepoint = f"after_is_next_part={tmp_path / 'frozen'}"
    frozen = fleet.submissions.start_for(places, test_part_rows="8", test_freezepoints=freezepoint)
    wait_until(lambda: is_stopped(frozen), what="the submission is about to write the first part")
    (job,) = {job.id for job in fleet.ledger.jobs.newest()} - before
    fleet.store.put(places.key("a.jpg"), sample_image(seed=90), content_type="image/jpeg")
    with fleet.dispatcher(test_part_rows="8"):
        resumed = fleet.submissions.start_for(places, "--resume", job, test_part_rows="8")
        assert fleet.submissions.wait_for(resumed) == 0
        os.kill(frozen, signal.SIGCONT)
        assert fleet.submissions.wait_for(frozen) == EXIT_USAGE

        outcome = assert_exact(fleet, job, places, names=["a.jpg", *names], reference=reference)

    assert outcome.counts["done"] == 21
    assert set(fleet.workers.publish_counts(places).values()) == {1}
    assert "[job_busy]" in fleet.submissions.log_text()


def test_a_submission_that_is_killed_after_the_last_part_is_resumed_with_the_listed_images_only(
    fleet: Fleet, places: Places, reference: Reference, tmp_path: Path
) -> None:
    names = put_images(fleet.store, places, 4)
    before = {job.id for job in fleet.ledger.jobs.newest()}
    fleet.workers.start()
    killed = fleet.submissions.start_for(places, test_failpoints=f"after_add_part={tmp_path / 'killed'}")
    assert fleet.submissions.wait_for(killed) == -signal.SIGKILL
    (job,) = {job.id for job in fleet.ledger.jobs.newest()} - before
    fleet.store.put(places.key("later.jpg"), sample_image(seed=90), content_type="image/jpeg")
    with fleet.dispatcher():
        ran = fleet.run("submit", places.source, "--to", places.to, "--model", MODEL, "--resume", job)
        assert ran.returncode == 0, ran.stderr

        outcome = assert_exact(fleet, job, places, names=names, reference=reference)

    assert outcome.counts["done"] == 4


def test_a_damaged_manifest_pauses_its_own_job_only(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    """A user who may write to a destination may also overwrite its records."""
    names = put_images(fleet.store, places, 4)
    other_places = fleet.create_places()
    put_images(fleet.store, other_places, 4)
    fleet.workers.start()
    damaged = fleet.submit(other_places)
    part = other_places.destination.below(f"_cutfleet/{damaged}/manifest/000000.jsonl.gz")
    fleet.store.put(part, b"no gzip", content_type="application/gzip")
    with fleet.dispatcher() as dispatcher:
        wait_until(lambda: fleet.ledger.jobs.get(damaged).paused is not None, what="it is paused")
        job = submit()
        outcome = assert_exact(fleet, job, places, names=names, reference=reference, only_job=False)
        assert fleet.dispatchers.alive() == [dispatcher]

        assert str(fleet.ledger.jobs.get(damaged).paused).startswith("manifest_damaged: ")
        fleet.ledger.jobs.cancel(damaged)
        error = f"close failed, will be retried: Part 0 of the manifest of job {damaged}"
        wait_until(lambda: error in fleet.dispatchers.log_text(), what="the error is logged")

    assert outcome.counts["done"] == 4
    delete_object(fleet.store, part)


@pytest.mark.parametrize(
    "point", ["after_cutout", "before_submit_live", "after_submit_live"], ids=["recorded", "before", "after"]
)
def test_a_live_submission_that_is_killed_queues_no_image_or_all_of_them(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, tmp_path: Path, point: str
) -> None:
    """`after_cutout` follows each `put` but a mask's; the first is the job's record."""
    names = put_images(fleet.store, places, 8)
    before = {job.id for job in fleet.ledger.jobs.newest()}
    fleet.workers.start()
    killed = fleet.submissions.start_for(places, "--lane", "live", test_failpoints=f"{point}={tmp_path / point}")
    assert fleet.submissions.wait_for(killed) == -signal.SIGKILL
    begun = [job.id for job in fleet.ledger.jobs.newest() if job.id not in before]
    assert len(begun) == (point == "after_submit_live")
    with fleet.dispatcher():
        for job in begun:
            assert assert_exact(fleet, job, places, names=names, reference=reference).counts["done"] == 8

        again = submit("--lane", "live")
        outcome = assert_exact(fleet, again, places, names=names, reference=reference)

    assert outcome.counts["skipped" if begun else "done"] == 8
    assert set(fleet.workers.publish_counts(places).values()) == {1}
