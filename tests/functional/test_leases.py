"""What a worker holds is renewed, and a lease that is said to be lost is lost."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from jobs.job import ImageState
from jobs.ledger import Claim, Ledger
from jobs.recipe import Recipe
from jobs.s3.client import Store
from producer.demo.local_stack import LocalStack
from producer.submission.submit import Request, submit
from tests.support.environment import alone_url
from tests.support.factories import Places, put_images, wait_until
from workers.process.leases import Leases

MODEL = "u2net"
"""Nobody serves it: the tests claim by themselves."""
LEASE_S = 1.0


class Slow(Ledger):
    """Between what is asked and what is answered, the image is finished: the answer of `renew` is late."""

    finishes: Claim | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.asked = threading.Event()
        self.left = threading.Event()
        """The image is held no more: only then comes the answer."""

    def renew(self, held: Mapping[str, str], *, lease_s: float) -> list[str]:
        finishes = self.finishes if held else None
        if finishes is not None:
            self.finish(finishes, ImageState.DONE)
            self.finishes = None
        lost = super().renew(held, lease_s=lease_s)
        if finishes is not None:
            self.asked.set()
            self.left.wait(60)
        return lost


@pytest.fixture
def slow(stack: LocalStack, alone: Ledger) -> Iterator[Slow]:
    with Slow(alone_url(stack), name="slow") as slow:
        yield slow


@pytest.fixture
def image(store: Store, alone: Ledger, places: Places) -> str:
    put_images(store, places, 1)
    request = Request(
        source=places.source, destination=places.to, recipe=Recipe(model=MODEL), lane="live", name="", keys=None
    )
    return f"{submit(request, store=store, ledger=alone, lease_s=60, listed=lambda _: None).id}:0"


def claimed(ledger: Ledger, image: str, token: str, lease_s: float = LEASE_S) -> Claim:
    claim = ledger.claim(image, token=token, output=f"s3://x/{image}", lease_s=lease_s)
    assert claim.verdict == "go"
    return claim


def leases(ledger: Ledger, node: str) -> Leases:
    return Leases(ledger, node=node, lease_s=LEASE_S, facts=lambda: {"model": MODEL, "slots": 0})


def test_an_image_that_ends_while_its_lease_is_renewed_is_not_said_to_be_lost(
    slow: Slow, image: str, caplog: pytest.LogCaptureFixture
) -> None:
    claim = claimed(slow, image, "ours")

    with leases(slow, "finishing") as held:
        with held.hold(claim):
            slow.finishes = claim
            assert slow.asked.wait(60), "it was to be renewed, and was finished before"
        slow.left.set()
        wait_until(lambda: not held.in_flight())

    assert "lease lost" not in caplog.text


def test_an_image_that_another_worker_has_by_now_is_said_to_be_lost_once(
    alone: Ledger, image: str, caplog: pytest.LogCaptureFixture
) -> None:
    claim = claimed(alone, image, "ours", lease_s=0.01)
    wait_until(lambda: alone.claim(image, token="theirs", output="s3://x/a", lease_s=60).verdict == "go")

    with caplog.at_level(logging.WARNING), leases(alone, "slow") as held, held.hold(claim):
        wait_until(lambda: "lease lost" in caplog.text, what="it is said")
        said = alone.time_s()
        wait_until(lambda: alone.time_s() > said + LEASE_S, what="some more turns")

    assert caplog.text.count("lease lost") == 1


def test_an_image_that_the_same_worker_took_again_stays_its_own_when_the_first_take_ends(
    alone: Ledger, image: str
) -> None:
    """As after it was frozen past the lease: both tasks run in one process."""
    first = claimed(alone, image, "first", lease_s=0.01)
    second = Claim("go", image, "second")
    wait_until(lambda: alone.claim(image, token="second", output="s3://x/b", lease_s=LEASE_S).verdict == "go")

    with leases(alone, "twice") as held, contextlib.ExitStack() as ending:
        with held.hold(first):
            ending.enter_context(held.hold(second))
        began = alone.time_s()
        wait_until(lambda: lease_ends(alone, image) > began + 2 * LEASE_S, what="it is renewed, a lease and more later")

        assert held.in_flight() == 1
        assert alone.renew({image: "second"}, lease_s=60) == [], "the second take has it"


def lease_ends(ledger: Ledger, image: str) -> float:
    return float(ledger._redis.zscore("cf:leased", image) or 0)  # type: ignore[arg-type]  # the types cover asyncio too
