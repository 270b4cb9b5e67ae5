"""Old and new versions at the same time: each reads what it can, and leaves the rest to the other."""

from __future__ import annotations

from tests.faults.fleet import Fleet, Reference, Submit
from tests.faults.invariants import assert_exact
from tests.faults.processes import LONG_LEASE_S
from tests.support.images import put_images
from tests.support.places import Places
from tests.support.waiting import wait_until

SOME = 8


def test_workers_leave_messages_of_a_later_version_to_its_workers(
    fleet: Fleet, places: Places, reference: Reference
) -> None:
    names = put_images(fleet.store, places, SOME)
    fleet.workers.start(lease_s=LONG_LEASE_S)
    with fleet.dispatcher(test_version="2"):
        assert fleet.submissions.wait_for(fleet.submissions.start_for(places, test_version="2")) == 0
        (job,) = fleet.ledger.jobs.open()
        wait_until(
            lambda: fleet.workers.log_text().count("needs a newer worker") > 2 * SOME,
            what=f"each message was published again: {fleet.workers.log_tail()}",
        )
        meanwhile = fleet.ledger.jobs.get(job.id)

        fleet.workers.start(test_version="2", lease_s=LONG_LEASE_S)
        outcome = assert_exact(fleet, job.id, places, names=names, reference=reference)

    assert (meanwhile.open, meanwhile.failed) == (SOME, 0)
    assert outcome.counts["done"] == SOME
    assert set(fleet.workers.publish_counts(places).values()) == {1}
    assert set(fleet.workers.claim_counts(job.id).values()) == {1}
    assert fleet.workers.terminate() == [0, 0]


def test_a_producer_that_is_updated_first_loses_no_image(fleet: Fleet, places: Places, reference: Reference) -> None:
    names = put_images(fleet.store, places, SOME)
    fleet.workers.start(lease_s=LONG_LEASE_S)
    with fleet.dispatcher():
        assert fleet.submissions.wait_for(fleet.submissions.start_for(places, test_version="2")) == 0
        (job,) = fleet.ledger.jobs.open()
        log_start = len(fleet.dispatchers.log_text())
        earlier = fleet.workers.log_text().count("needs a newer worker")
        wait_until(
            lambda: fleet.workers.log_text().count("needs a newer worker") > earlier, what="the worker leaves them"
        )
        fleet.workers.start(test_version="2", lease_s=LONG_LEASE_S)
        wait_until(
            lambda: fleet.ledger.jobs.get(job.id).done == SOME,
            what=f"the newer worker has done them: {fleet.workers.log_tail()}",
        )
        ours = fleet.create_places()
        put_images(fleet.store, ours, 1)
        after = fleet.submit(ours)
        wait_until(lambda: fleet.ledger.jobs.get(after).closed is not None, what="the dispatcher continues")
        log = fleet.dispatchers.log_text()[log_start:]
    with fleet.dispatcher(test_version="2"):
        outcome = assert_exact(fleet, job.id, places, names=names, reference=reference)

    assert outcome.counts["done"] == SOME
    assert set(fleet.workers.claim_counts(job.id).values()) == {1}
    assert log.count("job needs a newer dispatcher") == 1, log
    assert " error   " not in log, log
    assert fleet.workers.terminate() == [0, 0]


def test_old_and_new_workers_share_the_job_of_an_earlier_version(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, 3 * SOME)
    fleet.workers.start(test_device_ms="50", lease_s=LONG_LEASE_S)
    fleet.workers.start(test_device_ms="50", lease_s=LONG_LEASE_S, test_version="2")
    with fleet.dispatcher(lease_s=LONG_LEASE_S):
        outcome = assert_exact(fleet, submit(), places, names=names, reference=reference)
        wait_until(
            lambda: all(int(beat["images"]) for beat in fleet.ledger.fleet.workers().values()),
            what="both have done images",
        )

    assert outcome.counts["done"] == 3 * SOME
    assert set(fleet.workers.publish_counts(places).values()) == {1}
    assert fleet.workers.terminate() == [0, 0]
