"""S3 fails, wholly or in part: what can't be helped is named at once, everything else arrives."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from jobs.s3.client import Location
from tests.faults.fleet import UNHURRIED_S, Fleet, Reference, Submit
from tests.faults.proxy import Fault, S3Proxy, Wire
from tests.faults.truth import prove
from tests.support.factories import Places, put_images, sample_image, wait_until

SOME = 16
EXIT_DRAIN_DEADLINE = 75
AWAY_S = float(os.environ.get("CUTFLEET_TEST_AWAY_S", "0"))
"""How long the store is away at least; 600 by hand, with a longer --timeout."""
GIVEN_BACK_S = 300
"""After which a worker that holds gives its images back, and takes others or the same."""


@pytest.fixture
def s3(fleet: Fleet) -> Iterator[S3Proxy]:
    with S3Proxy(fleet.stack.s3_port, seed=7) as s3:
        yield s3


def tries(fleet: Fleet) -> dict[str, str]:
    """Tries that were used up, by image, of images that are not final."""
    return dict(fleet.ledger._redis.hgetall("cf:tries"))  # type: ignore[arg-type]  # the types cover asyncio too


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
def test_a_store_that_fails_now_and_then_costs_time_and_nothing_else(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, s3: S3Proxy, fault: Fault
) -> None:
    names = put_images(fleet.store, places, SOME)
    fleet.workers.start(s3_endpoint=s3.url)
    with fleet.dispatcher(), s3.fault(fault):
        job = submit()

        truth = prove(fleet, job, places, names=names, reference=reference, within_s=90)

    assert sum(s3.caused.values()) >= 4
    assert truth.counts["done"] == SOME
    assert fleet.workers.dismiss() == [0]


@pytest.mark.parametrize("how", ["refused", "hangs", "slow_down"])
def test_while_the_whole_store_is_away_workers_hold_and_no_try_is_used_up(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, s3: S3Proxy, how: str
) -> None:
    names = put_images(fleet.store, places, SOME)
    holding = fleet.workers.text().count("holding:")
    with Wire(fleet.stack.s3_port) as wire:
        endpoint = f"http://127.0.0.1:{wire.port}" if how == "refused" else s3.url
        worker = fleet.workers.start(s3_endpoint=endpoint, test_device_ms="400", lease_s=UNHURRIED_S)
        with fleet.dispatcher(lease_s=UNHURRIED_S):
            job = submit()
            wait_until(lambda: fleet.ledger.job(job).done >= 4)
            if how == "refused":
                wire.refuse()
                away_for_a_while(fleet, holding)
                wire.allow()
            else:
                with s3.fault(Fault("hang") if how == "hangs" else Fault("answer")):
                    away_for_a_while(fleet, holding)
            truth = prove(fleet, job, places, names=names, reference=reference, within_s=100)

    assert truth.counts["done"] == SOME
    again = 4 * (1 + int(AWAY_S / GIVEN_BACK_S))
    begun = fleet.workers.begun(job)
    assert sum(begun.values()) <= SOME + again, "only what met the end of the outage, one a slot, may be begun again"
    assert worker in fleet.workers.alive()
    assert fleet.workers.dismiss() == [0]


def away_for_a_while(fleet: Fleet, known: int) -> None:
    """Until some of the four slots have tried in vain more than once."""
    back = time.monotonic() + AWAY_S
    wait_until(
        lambda: fleet.workers.text().count("holding:") >= known + 6 and time.monotonic() > back, within_s=AWAY_S + 110
    )
    assert not tries(fleet)


def test_a_worker_told_to_go_while_the_store_is_away_gives_its_images_back(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, s3: S3Proxy
) -> None:
    names = put_images(fleet.store, places, 8)
    holding = fleet.workers.text().count("holding:")
    worker = fleet.workers.start(s3_endpoint=s3.url, drain_s="30")
    with fleet.dispatcher():
        with s3.fault(Fault("answer")):
            job = submit()
            wait_until(lambda: fleet.workers.text().count("holding:") > holding + 4)
            os.kill(worker, signal.SIGTERM)
            assert fleet.workers.wait_for(worker) == 0
        assert not tries(fleet)
        fleet.workers.start(s3_endpoint=s3.url)

        truth = prove(fleet, job, places, names=names, reference=reference)

    assert truth.counts["done"] == 8


def test_told_to_go_with_downloads_that_hang_a_worker_leaves_by_the_deadline_and_another_goes_on(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, s3: S3Proxy
) -> None:
    names = put_images(fleet.store, places, 8)
    worker = fleet.workers.start(s3_endpoint=s3.url, drain_s="2")
    with fleet.dispatcher(), s3.fault(Fault("hang", methods=("GET",))):
        job = submit()
        wait_until(lambda: s3.caused["hang"] >= 4, what="all slots wait for a body")

        os.kill(worker, signal.SIGTERM)
        assert fleet.workers.wait_for(worker) == EXIT_DRAIN_DEADLINE
        assert not tries(fleet)
        fleet.workers.start()
        truth = prove(fleet, job, places, names=names, reference=reference)

    assert truth.counts["done"] == 8
    assert fleet.workers.dismiss() == [0]


def test_a_worker_that_alone_can_not_reach_the_store_leaves_its_images_to_others(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, s3: S3Proxy
) -> None:
    names = put_images(fleet.store, places, 8)
    holding = fleet.workers.text().count("holding:")
    astray = fleet.workers.start(s3_endpoint=s3.url, slots="2", test_hold_s="1")
    with fleet.dispatcher(), s3.fault(Fault("answer", status=403, code="RequestTimeTooSkewed")):
        job = submit()
        wait_until(lambda: fleet.workers.text().count("holding:") > holding + 2)
        fleet.workers.start()
        truth = prove(fleet, job, places, names=names, reference=reference)
        assert astray in fleet.workers.alive()

    assert truth.counts["done"] == 8
    assert set(fleet.workers.dismiss()) == {0}


def test_one_prefix_that_is_denied_fails_at_once_with_its_code_and_the_others_go_on(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, s3: S3Proxy
) -> None:
    names = put_images(fleet.store, places, 8)
    denied = [f"secret/p{number}.jpg" for number in range(4)]
    for name in denied:
        fleet.store.put(places.key(name), sample_image(), content_type="image/jpeg")
    bucket = Location.parse(places.source).bucket
    fleet.workers.start(s3_endpoint=s3.url)
    with fleet.dispatcher(), s3.fault(Fault("answer", (f"/{bucket}/secret/",), status=403, code="AccessDenied")):
        job = submit()

        truth = prove(fleet, job, places, names=sorted(names + denied), reference=reference)

    assert (truth.counts["done"], truth.counts["failed"]) == (8, 4)
    failures = [failure for _, failure in fleet.ledger.failures(job)]
    assert {(failure.code, failure.tries) for failure in failures} == {("source_denied", 1)}


def test_one_object_that_can_not_be_read_uses_up_its_own_tries_alone(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, s3: S3Proxy
) -> None:
    names = put_images(fleet.store, places, 6)
    bucket = Location.parse(places.source).bucket
    fleet.workers.start(s3_endpoint=s3.url, max_tries="3")
    broken = Fault("answer", (f"/{bucket}/{names[2]}",), status=500, code="InternalError")
    with fleet.dispatcher(), s3.fault(broken):
        job = submit()

        truth = prove(fleet, job, places, names=names, reference=reference)

    assert truth.states[2] == "failed"
    assert truth.counts["done"] == 5
    [(_, failure)] = fleet.ledger.failures(job)
    assert (failure.code, failure.tries) == ("store_busy", 3)


@pytest.mark.usefixtures("asleep")
def test_a_bucket_that_disappears_fails_its_own_job_which_can_be_repeated_and_no_other(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, s3: S3Proxy
) -> None:
    """Lost messages of other jobs are still found while its report can't be written."""
    names = put_images(fleet.store, places, 8)
    others = Places(places.source, f"s3://{Location.parse(places.to).bucket}-others/")
    fleet.store.create_bucket(Location.parse(others.to).bucket)
    gone = Fault("answer", (f"/{Location.parse(places.to).bucket}/",), status=404, code="NoSuchBucket")
    with fleet.dispatcher(s3_endpoint=s3.url, lease_s="5"):
        with s3.fault(gone):
            job = submit("--lane", "live")
            fleet.workers.start(s3_endpoint=s3.url)
            wait_until(lambda: fleet.ledger.job(job).failed == 8)
            fleet.workers.dismiss(signal.SIGKILL)
            other = fleet.run("submit", places.source, "--to", others.to, "--model", "stand-in").stdout.strip()
            wait_until(lambda: fleet.ledger.queue_depth("backfill.stand-in") == 8)
            fleet.ledger._redis.delete("backfill.stand-in")
            fleet.workers.start(s3_endpoint=s3.url)
            prove(fleet, other, others, names=names, reference=reference, alone=False)
        wait_until(lambda: fleet.ledger.job(job).closed is not None)
        assert fleet.run("retry", job, "--code", "bucket_missing").returncode == 0

        truth = prove(fleet, job, places, names=names, reference=reference)

    assert truth.counts["done"] == 8
    assert fleet.workers.dismiss() == [0]


@pytest.mark.usefixtures("asleep")
def test_a_store_that_is_busy_for_one_job_holds_up_no_other(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, s3: S3Proxy
) -> None:
    names = put_images(fleet.store, places, 4)
    others = Places(places.source, f"s3://{Location.parse(places.to).bucket}-others/")
    fleet.store.create_bucket(Location.parse(others.to).bucket)
    fleet.workers.start()
    stuck = submit()
    busy = Fault("answer", (f"/{Location.parse(places.to).bucket}/_cutfleet/",), status=503, code="SlowDown")
    with fleet.dispatcher(s3_endpoint=s3.url):
        with s3.fault(busy):
            wait_until(lambda: f"not fed yet: S3 at {s3.url} is busy" in fleet.dispatchers.text())
            other = fleet.run("submit", places.source, "--to", others.to, "--model", "stand-in").stdout.strip()
            prove(fleet, other, others, names=names, reference=reference, alone=False)
            assert fleet.ledger.job(stuck).cursor == 0
        truth = prove(fleet, stuck, places, names=names, reference=reference)

    assert truth.counts["done"] == 4
    assert fleet.workers.dismiss() == [0]
