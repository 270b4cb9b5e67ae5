"""Dispatchers are killed, frozen, and two at once: what is fed is fed once, and one that wakes changes nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from factories import Places, put_pictures, wait_until
from faults.fleet import PICTURES, Fleet, Reference, Submit
from faults.truth import prove

BOUNDARIES = ("before_feed", "after_feed", "after_report", "before_close_job", "after_close_job")


def test_killed_at_every_boundary_a_dispatcher_loses_no_picture(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, tmp_path: Path
) -> None:
    names = put_pictures(fleet.store, places, PICTURES)
    fleet.workers.start()
    flags = {place: tmp_path / place for place in BOUNDARIES}
    with fleet.dispatcher(test_failpoints=",".join(f"{place}={flag}" for place, flag in flags.items())):
        job = submit()
        truth = prove(fleet, job, places, names=names, reference=reference)
        wait_until(lambda: all(flag.exists() for flag in flags.values()))

    assert truth.counts["done"] == PICTURES
    assert set(fleet.workers.published(places).values()) == {1}
    assert list(fleet.dispatchers.ends().values()).count(-signal.SIGKILL) == len(BOUNDARIES)


def test_of_two_dispatchers_one_works_and_one_that_was_frozen_changes_nothing(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_pictures(fleet.store, places, PICTURES)
    fleet.workers.start(test_device_ms="100")
    before = fleet.active()
    with fleet.dispatcher() as first:
        wait_until(lambda: fleet.active() > before, what="the first is active, before there is a second")
        with fleet.dispatcher():
            job = submit()
            wait_until(lambda: fleet.ledger.job(job).done > 2)
            epoch = fleet.active()
            os.kill(first, signal.SIGSTOP)
            wait_until(lambda: fleet.active() > epoch)
            os.kill(first, signal.SIGCONT)

            truth = prove(fleet, job, places, names=names, reference=reference)

    assert truth.counts["done"] == PICTURES
    assert set(fleet.workers.published(places).values()) == {1}


@pytest.mark.parametrize("place", ["before_create_job", "before_add_part", "after_add_part"])
def test_a_producer_killed_between_part_and_count_is_resumed_or_repeated(
    fleet: Fleet, places: Places, reference: Reference, tmp_path: Path, place: str
) -> None:
    names = put_pictures(fleet.store, places, 8)
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


@pytest.mark.parametrize(
    "place", ["after_cutout", "before_submit_live", "after_submit_live"], ids=["recorded", "before", "after"]
)
def test_a_producer_of_live_pictures_that_is_killed_leaves_nothing_to_do_or_all_of_it(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, tmp_path: Path, place: str
) -> None:
    """`after_cutout`, of an object that is no mask: its first is the job's record."""
    names = put_pictures(fleet.store, places, 8)
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
