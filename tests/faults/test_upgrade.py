"""Old and new versions side by side: each reads what it can, and leaves the rest to the other without harm."""

from __future__ import annotations

from tests.faults.fleet import UNHURRIED_S, Fleet, Reference, Submit, make_places, submit_to
from tests.faults.truth import prove
from tests.support.factories import Places, put_images, wait_until

SOME = 8


def test_workers_leave_what_a_later_version_wrote_to_its_workers(
    fleet: Fleet, places: Places, reference: Reference
) -> None:
    names = put_images(fleet.store, places, SOME)
    fleet.workers.start(lease_s=UNHURRIED_S)
    with fleet.dispatcher(test_version="2"):
        assert fleet.submits.wait_for(fleet.submits.start_for(places, test_version="2")) == 0
        (job,) = fleet.ledger.open_jobs()
        wait_until(
            lambda: fleet.workers.text().count("left for a newer worker") > 2 * SOME,
            what=f"each was published again: {fleet.workers.words()}",
        )
        meanwhile = fleet.ledger.job(job.id)

        fleet.workers.start(test_version="2", lease_s=UNHURRIED_S)
        truth = prove(fleet, job.id, places, names=names, reference=reference)

    assert (meanwhile.open, meanwhile.failed) == (SOME, 0)
    assert truth.counts["done"] == SOME
    assert set(fleet.workers.published(places).values()) == {1}
    assert set(fleet.workers.begun(job.id).values()) == {1}
    assert fleet.workers.dismiss() == [0, 0]


def test_a_producer_of_a_later_version_loses_nothing_by_coming_first(
    fleet: Fleet, places: Places, reference: Reference
) -> None:
    names = put_images(fleet.store, places, SOME)
    fleet.workers.start(lease_s=UNHURRIED_S)
    with fleet.dispatcher():
        assert fleet.submits.wait_for(fleet.submits.start_for(places, test_version="2")) == 0
        (job,) = fleet.ledger.open_jobs()
        known_text = len(fleet.dispatchers.text())
        known = fleet.workers.text().count("left for a newer worker")
        wait_until(lambda: fleet.workers.text().count("left for a newer worker") > known, what="they are left")
        fleet.workers.start(test_version="2", lease_s=UNHURRIED_S)
        wait_until(lambda: fleet.ledger.job(job.id).done == SOME, what=f"they are done: {fleet.workers.words()}")
        ours = make_places(fleet)
        put_images(fleet.store, ours, 1)
        after = submit_to(fleet, ours)
        wait_until(lambda: fleet.ledger.job(after).closed is not None, what="the dispatcher goes on")
        said = fleet.dispatchers.text()[known_text:]
    with fleet.dispatcher(test_version="2"):
        truth = prove(fleet, job.id, places, names=names, reference=reference)

    assert truth.counts["done"] == SOME
    assert set(fleet.workers.begun(job.id).values()) == {1}
    assert said.count("left for a newer dispatcher") == 1, said
    assert " error   " not in said, said
    assert fleet.workers.dismiss() == [0, 0]


def test_old_and_new_workers_share_what_an_earlier_version_wrote(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, 3 * SOME)
    for version in ({}, {"test_version": "2"}):
        fleet.workers.start(test_device_ms="50", lease_s=UNHURRIED_S, **version)
    with fleet.dispatcher(lease_s=UNHURRIED_S):
        truth = prove(fleet, submit(), places, names=names, reference=reference)
        wait_until(lambda: all(int(facts["images"]) for facts in fleet.ledger.workers().values()), what="both had some")

    assert truth.counts["done"] == 3 * SOME
    assert set(fleet.workers.published(places).values()) == {1}
    assert fleet.workers.dismiss() == [0, 0]
