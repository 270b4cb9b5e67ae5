"""A worker's leases are renewed, and the log names a lease only if it is lost."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

import pytest

from jobs.job import ImageState
from jobs.ledger import Ledger
from jobs.ledger.window import Claim, ClaimOutcome
from jobs.recipe import Recipe
from jobs.s3.client import Store
from producer.demo.local_stack import LocalStack
from producer.submission.request import Request
from producer.submission.submit import submit
from tests.support.environment import own_redis_url
from tests.support.images import put_images
from tests.support.places import Places
from tests.support.waiting import wait_until
from workers.process.leases import Leases

MODEL = "u2net"
"""No worker serves it: only the tests claim its images."""
LEASE_S = 1.0


@pytest.fixture
def worker_ledger(stack: LocalStack, own_ledger: Ledger) -> Iterator[Ledger]:
    """The worker's own client of the same ledger."""
    with Ledger(own_redis_url(stack), name="worker") as ledger:
        yield ledger


@pytest.fixture
def image(store: Store, own_ledger: Ledger, places: Places) -> str:
    """A live image in the window."""
    put_images(store, places, 1)
    request = Request(
        source=places.source_location,
        destination=places.destination,
        recipe=Recipe(model=MODEL),
        lane="live",
        name="",
        keys=None,
    )
    return f"{submit(request, store=store, ledger=own_ledger, lease_s=60, listed=lambda _: None).id}:0"


def claim_when_free(ledger: Ledger, image: str, token: str, *, output: str, lease_s: float) -> Claim:
    claims: list[Claim] = []

    def is_claimed() -> bool:
        claims.append(ledger.window.claim(image, token=token, output=output, lease_s=lease_s))
        return claims[-1].outcome is ClaimOutcome.GO

    wait_until(is_claimed, what=f"{image} is claimed")
    return claims[-1]


def start_leases(ledger: Ledger, node: str) -> Leases:
    return Leases(ledger, node=node, lease_s=LEASE_S, heartbeat=lambda: {"model": MODEL, "slots": 0})


def finish_during_renewal(ledger: Ledger, claim: Claim, left: threading.Event) -> threading.Event:
    """Finish the image before the next renewal is sent, and hold its answer back until `left` is set. Return an event
    that is set once the renewal is sent."""
    sent = threading.Event()
    window = ledger.window
    renew: Callable[..., list[str]] = window.renew

    def renew_late(leases: dict[str, str], *, lease_s: float) -> list[str]:
        if claim.image not in leases or sent.is_set():
            return renew(leases, lease_s=lease_s)
        window.finish(claim, ImageState.DONE)
        missed = renew(leases, lease_s=lease_s)
        sent.set()
        left.wait(60)
        return missed

    window.renew = renew_late  # type: ignore[method-assign,assignment]  # a slower `renew`
    return sent


def test_an_image_that_is_recorded_during_a_renewal_is_not_logged_as_lost(
    worker_ledger: Ledger, image: str, caplog: pytest.LogCaptureFixture
) -> None:
    claim = claim_when_free(worker_ledger, image, "ours", output="s3://x/a", lease_s=LEASE_S)
    left = threading.Event()

    with start_leases(worker_ledger, "finishing") as leases:
        with leases.renewing(claim):
            sent = finish_during_renewal(worker_ledger, claim, left)
            assert sent.wait(60), "the lease is renewed"
        left.set()
        wait_until(lambda: not leases.in_flight())

    assert "lease lost" not in caplog.text


def test_a_lost_lease_is_logged_once(own_ledger: Ledger, image: str, caplog: pytest.LogCaptureFixture) -> None:
    claim = claim_when_free(own_ledger, image, "ours", output="s3://x/a", lease_s=0.01)
    claim_when_free(own_ledger, image, "theirs", output="s3://x/a", lease_s=60)

    with caplog.at_level(logging.WARNING), start_leases(own_ledger, "slow") as leases, leases.renewing(claim):
        wait_until(lambda: "lease lost" in caplog.text, what="the loss is logged")
        logged_s = own_ledger.server_time_s()
        wait_until(lambda: own_ledger.server_time_s() > logged_s + LEASE_S, what="more renewals")

    assert caplog.text.count("lease lost") == 1


def test_a_worker_that_claims_its_lost_image_again_renews_the_second_claim_after_the_first_attempt_ends(
    own_ledger: Ledger, image: str
) -> None:
    """As after the process was frozen for longer than a lease: both attempts run in it."""
    first = claim_when_free(own_ledger, image, "first", output="s3://x/a", lease_s=0.01)
    second = claim_when_free(own_ledger, image, "second", output="s3://x/b", lease_s=LEASE_S)

    with start_leases(own_ledger, "twice") as leases, contextlib.ExitStack() as second_attempt:
        with leases.renewing(first):
            second_attempt.enter_context(leases.renewing(second))
        ended_s = own_ledger.server_time_s()
        wait_until(lambda: lease_end_s(own_ledger, image) > ended_s + 2 * LEASE_S, what="the lease is renewed twice")

        assert leases.in_flight() == 1
        assert own_ledger.window.renew({image: "second"}, lease_s=60) == [], "the second claim has the lease"


def lease_end_s(ledger: Ledger, image: str) -> float:
    return float(ledger.connection.call("zscore", "cf:leased", image) or 0)
