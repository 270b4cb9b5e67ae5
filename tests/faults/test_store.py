"""S3 fails, completely or in part: images that no retry can help fail at once, all others are done."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from tests.faults.fleet import Fleet, Reference, Submit
from tests.faults.invariants import assert_exact
from tests.faults.processes import LONG_LEASE_S
from tests.faults.s3_proxy import Fault, S3Proxy
from tests.faults.wire import Wire
from tests.support.images import put_images, sample_image
from tests.support.places import Places
from tests.support.waiting import wait_until

SOME = 16
EXIT_DRAIN_DEADLINE = 75
AWAY_S = float(os.environ.get("CUTFLEET_TEST_AWAY_S", "0"))
"""Shortest outage of the store; run with 600 and a longer --timeout by hand."""
RELEASE_S = 300
"""A worker that waits for the store releases its images after this time, and claims again."""


@pytest.fixture
def s3(fleet: Fleet) -> Iterator[S3Proxy]:
    with S3Proxy(fleet.stack.s3_port, seed=7) as s3:
        yield s3


def used_attempts(fleet: Fleet) -> dict[str, str]:
    """Return the attempts used up by image, of images that are not final."""
    return dict(fleet.ledger.connection.call("hgetall", "cf:tries"))


@pytest.mark.parametrize(
    "fault",
    [
        Fault("answer", status=503, code="SlowDown", share=0.25),
        Fault("answer", status=500, code="InternalError", share=0.25),
        Fault("reset", share=0.25),
        Fault("half", methods=("GET",), share=0.25),
        Fault("lose", methods=("PUT",), share=0.25),
    ],
    ids=["slow_down", "internal_error", "reset", "reset_in_mid_body", "answer_of_a_put_lost"],
)
def test_a_store_that_fails_some_requests_fails_no_image(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, s3: S3Proxy, fault: Fault
) -> None:
    names = put_images(fleet.store, places, SOME)
    fleet.workers.start(s3_endpoint=s3.url)
    with fleet.dispatcher(), s3.fault(fault):
        job = submit()

        outcome = assert_exact(fleet, job, places, names=names, reference=reference, within_s=90)

    assert sum(s3.caused.values()) >= 4
    assert outcome.counts["done"] == SOME
    assert fleet.workers.terminate() == [0]


@pytest.mark.parametrize("how", ["refused", "hangs", "slow_down"])
def test_while_the_store_is_away_workers_wait_and_use_up_no_attempt(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, s3: S3Proxy, how: str
) -> None:
    names = put_images(fleet.store, places, SOME)
    holding = fleet.workers.log_text().count("waiting for the service:")
    with Wire(fleet.stack.s3_port) as wire:
        endpoint = f"http://127.0.0.1:{wire.port}" if how == "refused" else s3.url
        worker = fleet.workers.start(s3_endpoint=endpoint, test_device_ms="400", lease_s=LONG_LEASE_S)
        with fleet.dispatcher(lease_s=LONG_LEASE_S):
            job = submit()
            wait_until(lambda: fleet.ledger.jobs.get(job).done >= 4)
            if how == "refused":
                wire.refuse()
                wait_out_outage(fleet, holding)
                wire.allow()
            else:
                with s3.fault(Fault("hang") if how == "hangs" else Fault("answer")):
                    wait_out_outage(fleet, holding)
            outcome = assert_exact(fleet, job, places, names=names, reference=reference, within_s=100)

    assert outcome.counts["done"] == SOME
    repeated = 4 * (1 + int(AWAY_S / RELEASE_S))
    claims = fleet.workers.claim_counts(job)
    assert sum(claims.values()) <= SOME + repeated, (
        "only the images in work at the end of the outage, one a slot, are claimed again"
    )
    assert worker in fleet.workers.alive()
    assert fleet.workers.terminate() == [0]


def wait_out_outage(fleet: Fleet, earlier: int) -> None:
    """Wait until some of the four slots have failed more than once."""
    end = time.monotonic() + AWAY_S
    wait_until(
        lambda: fleet.workers.log_text().count("waiting for the service:") >= earlier + 6 and time.monotonic() > end,
        within_s=AWAY_S + 110,
    )
    assert not used_attempts(fleet)


def test_a_worker_that_is_stopped_while_the_store_is_away_releases_its_images(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, s3: S3Proxy
) -> None:
    names = put_images(fleet.store, places, 8)
    holding = fleet.workers.log_text().count("waiting for the service:")
    worker = fleet.workers.start(s3_endpoint=s3.url, drain_s="30")
    with fleet.dispatcher():
        with s3.fault(Fault("answer")):
            job = submit()
            wait_until(lambda: fleet.workers.log_text().count("waiting for the service:") > holding + 4)
            os.kill(worker, signal.SIGTERM)
            assert fleet.workers.wait_for(worker) == 0
        assert not used_attempts(fleet)
        fleet.workers.start(s3_endpoint=s3.url)

        outcome = assert_exact(fleet, job, places, names=names, reference=reference)

    assert outcome.counts["done"] == 8


def test_a_worker_with_hanging_downloads_stops_at_the_drain_deadline_and_another_finishes_them(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, s3: S3Proxy
) -> None:
    names = put_images(fleet.store, places, 8)
    worker = fleet.workers.start(s3_endpoint=s3.url, drain_s="2")
    with fleet.dispatcher(), s3.fault(Fault("hang", methods=("GET",))):
        job = submit()
        wait_until(lambda: s3.caused["hang"] >= 4, what="every slot has a hanging download")

        os.kill(worker, signal.SIGTERM)
        assert fleet.workers.wait_for(worker) == EXIT_DRAIN_DEADLINE
        assert not used_attempts(fleet)
        fleet.workers.start()
        outcome = assert_exact(fleet, job, places, names=names, reference=reference)

    assert outcome.counts["done"] == 8
    assert fleet.workers.terminate() == [0]


def test_a_single_worker_that_the_store_refuses_releases_its_images_to_others(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, s3: S3Proxy
) -> None:
    names = put_images(fleet.store, places, 8)
    holding = fleet.workers.log_text().count("waiting for the service:")
    refused_worker = fleet.workers.start(s3_endpoint=s3.url, slots="2", test_hold_s="1")
    with fleet.dispatcher(), s3.fault(Fault("answer", status=403, code="RequestTimeTooSkewed")):
        job = submit()
        wait_until(lambda: fleet.workers.log_text().count("waiting for the service:") > holding + 2)
        fleet.workers.start()
        outcome = assert_exact(fleet, job, places, names=names, reference=reference)
        assert refused_worker in fleet.workers.alive()

    assert outcome.counts["done"] == 8
    assert set(fleet.workers.terminate()) == {0}


def test_images_of_a_denied_prefix_fail_at_once_and_the_others_are_done(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, s3: S3Proxy
) -> None:
    names = put_images(fleet.store, places, 8)
    denied = [f"secret/p{number}.jpg" for number in range(4)]
    for name in denied:
        fleet.store.put(places.key(name), sample_image(), content_type="image/jpeg")
    bucket = places.source_location.bucket
    fleet.workers.start(s3_endpoint=s3.url)
    with fleet.dispatcher(), s3.fault(Fault("answer", (f"/{bucket}/secret/",), status=403, code="AccessDenied")):
        job = submit()

        outcome = assert_exact(fleet, job, places, names=sorted(names + denied), reference=reference)

    assert (outcome.counts["done"], outcome.counts["failed"]) == (8, 4)
    failures = [failure for _, failure in fleet.ledger.images.failures(job)]
    assert {(failure.code, failure.tries) for failure in failures} == {("source_denied", 1)}


def test_an_object_that_cannot_be_read_uses_up_only_its_own_attempts(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, s3: S3Proxy
) -> None:
    names = put_images(fleet.store, places, 6)
    bucket = places.source_location.bucket
    fleet.workers.start(s3_endpoint=s3.url, max_tries="3")
    broken = Fault("answer", (f"/{bucket}/{names[2]}",), status=500, code="InternalError")
    with fleet.dispatcher(), s3.fault(broken):
        job = submit()

        outcome = assert_exact(fleet, job, places, names=names, reference=reference)

    assert outcome.states[2] == "failed"
    assert outcome.counts["done"] == 5
    [(_, failure)] = fleet.ledger.images.failures(job)
    assert (failure.code, failure.tries) == ("store_busy", 3)


@pytest.mark.usefixtures("fake_worker")
def test_a_bucket_that_disappears_fails_only_its_own_job_which_can_be_replayed(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, s3: S3Proxy
) -> None:
    """Lost messages of other jobs are still published again while its report can't be written."""
    names = put_images(fleet.store, places, 8)
    others = Places(places.source, f"s3://{places.destination.bucket}-others/")
    fleet.store.create_bucket(others.destination.bucket)
    missing = Fault("answer", (f"/{places.destination.bucket}/",), status=404, code="NoSuchBucket")
    with fleet.dispatcher(s3_endpoint=s3.url, lease_s="5"):
        with s3.fault(missing):
            job = submit("--lane", "live")
            fleet.workers.start(s3_endpoint=s3.url)
            wait_until(lambda: fleet.ledger.jobs.get(job).failed == 8)
            fleet.workers.terminate(signal.SIGKILL)
            other = fleet.run("submit", places.source, "--to", others.to, "--model", "stand-in").stdout.strip()
            wait_until(lambda: fleet.ledger.window.queue_length("backfill.stand-in") == 8)
            fleet.ledger.connection.call("delete", "backfill.stand-in")
            fleet.workers.start(s3_endpoint=s3.url)
            assert_exact(fleet, other, others, names=names, reference=reference, only_job=False)
        wait_until(lambda: fleet.ledger.jobs.get(job).closed is not None)
        assert fleet.run("retry", job, "--code", "bucket_missing").returncode == 0

        outcome = assert_exact(fleet, job, places, names=names, reference=reference)

    assert outcome.counts["done"] == 8
    assert fleet.workers.terminate() == [0]


@pytest.mark.usefixtures("fake_worker")
def test_a_store_that_is_busy_for_one_job_delays_no_other(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, s3: S3Proxy
) -> None:
    names = put_images(fleet.store, places, 4)
    others = Places(places.source, f"s3://{places.destination.bucket}-others/")
    fleet.store.create_bucket(others.destination.bucket)
    fleet.workers.start()
    stuck = submit()
    busy = Fault("answer", (f"/{places.destination.bucket}/_cutfleet/",), status=503, code="SlowDown")
    with fleet.dispatcher(s3_endpoint=s3.url):
        with s3.fault(busy):
            wait_until(lambda: f"feed failed, will be retried: S3 at {s3.url} is busy" in fleet.dispatchers.log_text())
            other = fleet.run("submit", places.source, "--to", others.to, "--model", "stand-in").stdout.strip()
            assert_exact(fleet, other, others, names=names, reference=reference, only_job=False)
            assert fleet.ledger.jobs.get(stuck).cursor == 0
        outcome = assert_exact(fleet, stuck, places, names=names, reference=reference)

    assert outcome.counts["done"] == 4
    assert fleet.workers.terminate() == [0]
