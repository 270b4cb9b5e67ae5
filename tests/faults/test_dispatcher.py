"""Dispatchers are killed, frozen, and two at once: what is fed is fed once, and one that wakes changes nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from jobs.s3.client import Location
from tests.faults.fleet import IMAGES, Fleet, Reference, Submit, is_stopped, make_places, submit_to
from tests.faults.truth import prove
from tests.support.factories import Places, put_images, sample_image, wait_until

EXIT_USAGE = 2
BOUNDARIES = ("before_feed", "after_feed", "after_report", "before_close_job", "after_close_job")


def test_killed_at_every_boundary_a_dispatcher_loses_no_image(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, tmp_path: Path
) -> None:
    names = put_images(fleet.store, places, IMAGES)
    fleet.workers.start()
    flags = {place: tmp_path / place for place in BOUNDARIES}
    with fleet.dispatcher(test_failpoints=",".join(f"{place}={flag}" for place, flag in flags.items())):
        job = submit()
        truth = prove(fleet, job, places, names=names, reference=reference)
        wait_until(lambda: all(flag.exists() for flag in flags.values()))

    assert truth.counts["done"] == IMAGES
    assert set(fleet.workers.published(places).values()) == {1}
    assert list(fleet.dispatchers.ends().values()).count(-signal.SIGKILL) == len(BOUNDARIES)


def test_of_two_dispatchers_one_works_and_one_that_was_frozen_changes_nothing(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, IMAGES)
    fleet.workers.start(test_device_ms="100")
    before = fleet.active()
    with fleet.dispatcher() as first:
        wait_until(lambda: fleet.active() > before, what="the first is active, before there is a second")
        job = submit()
        wait_until(lambda: fleet.ledger.job(job).done > 2)
        epoch = fleet.active()
        os.kill(first, signal.SIGSTOP)
        with fleet.dispatcher():
            wait_until(lambda: fleet.active() > epoch)
            os.kill(first, signal.SIGCONT)

            truth = prove(fleet, job, places, names=names, reference=reference)

    assert truth.counts["done"] == IMAGES
    assert set(fleet.workers.published(places).values()) == {1}


def test_a_dispatcher_that_stood_still_with_its_workers_lets_them_renew_first(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    """As on a machine that was suspended, when it is the first to go on."""
    lease_s = 5
    names = put_images(fleet.store, places, 2)
    worker = fleet.workers.start(test_device_ms="4000", slots="2", lease_s=str(lease_s))
    with fleet.dispatcher(lease_s=str(lease_s)) as dispatcher:
        job = submit()
        wait_until(lambda: fleet.workers.begun(job).total() == 2, what="the worker has two in hand")
        for pid in (dispatcher, worker):
            os.kill(pid, signal.SIGSTOP)
        since = fleet.ledger.time_s()
        wait_until(lambda: fleet.ledger.time_s() > since + lease_s + 1, what="leases end")
        os.kill(dispatcher, signal.SIGCONT)
        fleet.let_dispatcher_turn(3)
        os.kill(worker, signal.SIGCONT)

        truth = prove(fleet, job, places, names=names, reference=reference)

    assert truth.counts["done"] == 2
    assert set(fleet.workers.begun(job).values()) == {1}


@pytest.mark.parametrize("place", ["before_create_job", "before_add_part", "after_add_part"])
def test_a_producer_killed_between_part_and_count_is_resumed_or_repeated(
    fleet: Fleet, places: Places, reference: Reference, tmp_path: Path, place: str
) -> None:
    names = put_images(fleet.store, places, 8)
    before = {job.id for job in fleet.ledger.jobs()}
    fleet.workers.start()
    killed = fleet.submits.start_for(places, test_failpoints=f"{place}={tmp_path / place}")
    assert fleet.submits.wait_for(killed) == -signal.SIGKILL
    with fleet.dispatcher():
        begun = [job.id for job in fleet.ledger.jobs() if job.id not in before]
        more = ("--resume", begun[0]) if begun else ()
        ran = fleet.run("submit", places.source, "--to", places.to, "--model", "stand-in", *more)
        assert ran.returncode == 0, ran.stderr

        truth = prove(fleet, ran.stdout.strip(), places, names=names, reference=reference)

    assert truth.counts["done"] == 8
    assert set(fleet.workers.published(places).values()) == {1}


def test_a_producer_that_was_frozen_while_another_listed_on_changes_no_part_of_the_manifest(
    fleet: Fleet, places: Places, reference: Reference, tmp_path: Path
) -> None:
    """What both list is not the same: an image came that is the first by its name."""
    names = put_images(fleet.store, places, 20)
    before = {job.id for job in fleet.ledger.jobs()}
    fleet.workers.start()
    freezes = f"after_is_next_part={tmp_path / 'frozen'}"
    frozen = fleet.submits.start_for(places, test_part_rows="8", test_freezepoints=freezes)
    wait_until(lambda: is_stopped(frozen), what="it is about to write the first part")
    (job,) = {job.id for job in fleet.ledger.jobs()} - before
    fleet.store.put(places.key("a.jpg"), sample_image(seed=90), content_type="image/jpeg")
    with fleet.dispatcher(test_part_rows="8"):
        resumed = fleet.submits.start_for(places, "--resume", job, test_part_rows="8")
        assert fleet.submits.wait_for(resumed) == 0
        os.kill(frozen, signal.SIGCONT)
        assert fleet.submits.wait_for(frozen) == EXIT_USAGE

        truth = prove(fleet, job, places, names=["a.jpg", *names], reference=reference)

    assert truth.counts["done"] == 21
    assert set(fleet.workers.published(places).values()) == {1}
    assert "[job_busy]" in fleet.submits.text()


def test_a_producer_killed_behind_the_last_part_leaves_a_job_that_ends_with_what_was_listed(
    fleet: Fleet, places: Places, reference: Reference, tmp_path: Path
) -> None:
    names = put_images(fleet.store, places, 4)
    before = {job.id for job in fleet.ledger.jobs()}
    fleet.workers.start()
    killed = fleet.submits.start_for(places, test_failpoints=f"after_add_part={tmp_path / 'killed'}")
    assert fleet.submits.wait_for(killed) == -signal.SIGKILL
    (job,) = {job.id for job in fleet.ledger.jobs()} - before
    fleet.store.put(places.key("later.jpg"), sample_image(seed=90), content_type="image/jpeg")
    with fleet.dispatcher():
        ran = fleet.run("submit", places.source, "--to", places.to, "--model", "stand-in", "--resume", job)
        assert ran.returncode == 0, ran.stderr

        truth = prove(fleet, job, places, names=names, reference=reference)

    assert truth.counts["done"] == 4


def test_a_damaged_manifest_stops_its_own_job_and_no_other(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    """Who may write to a destination may write to its records too."""
    names = put_images(fleet.store, places, 4)
    hurt = make_places(fleet)
    put_images(fleet.store, hurt, 4)
    fleet.workers.start()
    damaged = submit_to(fleet, hurt)
    part = f"_cutfleet/{damaged}/manifest/000000.jsonl.gz"
    fleet.store.put(Location(Location.parse(hurt.to).bucket, part), b"no gzip", content_type="application/gzip")
    with fleet.dispatcher() as dispatcher:
        wait_until(lambda: fleet.ledger.job(damaged).paused is not None, what="it is paused")
        job = submit()
        truth = prove(fleet, job, places, names=names, reference=reference, alone=False)
        assert fleet.dispatchers.alive() == [dispatcher]

        assert fleet.ledger.job(damaged).paused.startswith("manifest_damaged: ")
        fleet.ledger.cancel(damaged)
        wait_until(lambda: f"not closed yet: Part 0 of the manifest of job {damaged}" in fleet.dispatchers.text())

    assert truth.counts["done"] == 4
    fleet.store._s3.delete_object(Bucket=Location.parse(hurt.to).bucket, Key=part)


@pytest.mark.parametrize(
    "place", ["after_cutout", "before_submit_live", "after_submit_live"], ids=["recorded", "before", "after"]
)
def test_a_producer_of_live_images_that_is_killed_leaves_nothing_to_do_or_all_of_it(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, tmp_path: Path, place: str
) -> None:
    """`after_cutout`, of an object that is no mask: its first is the job's record."""
    names = put_images(fleet.store, places, 8)
    before = {job.id for job in fleet.ledger.jobs()}
    fleet.workers.start()
    killed = fleet.submits.start_for(places, "--lane", "live", test_failpoints=f"{place}={tmp_path / place}")
    assert fleet.submits.wait_for(killed) == -signal.SIGKILL
    begun = [job.id for job in fleet.ledger.jobs() if job.id not in before]
    assert len(begun) == (place == "after_submit_live")
    with fleet.dispatcher():
        for job in begun:
            assert prove(fleet, job, places, names=names, reference=reference).counts["done"] == 8

        again = submit("--lane", "live")
        truth = prove(fleet, again, places, names=names, reference=reference)

    assert truth.counts["skipped" if begun else "done"] == 8
    assert set(fleet.workers.published(places).values()) == {1}
