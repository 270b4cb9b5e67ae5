"""Clocks of single machines are off: leases, deadlines and messages go by the server's."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files

import pytest
import redis

from tests.faults.fleet import UNHURRIED_S, Fleet, Reference, Submit, Zygote, came_back
from tests.faults.truth import prove
from tests.support.factories import Places, put_images, wait_until

MINUTES_10, HOURS_3 = 600, 3 * 3600
"""S3 takes a clock that is a quarter of an hour off."""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Whose processes may have clocks of their own."""
    library = files("libfaketime") / "vendor" / "libfaketime" / "src" / "libfaketime.so.1"
    env = {"LD_PRELOAD": str(library), "FAKETIME": "+0", "FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    zygote = Zygote(tmp_path_factory.mktemp("clocks"), env)
    with Fleet(tmp_path_factory.mktemp("fleet"), zygote) as fleet:
        yield fleet
    zygote.stop()


def test_clocks_that_are_minutes_off_cost_no_image_and_bring_no_message_back(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, 48)
    unhurried = {"lease_s": UNHURRIED_S, "test_visibility_s": "20"}
    for clock in (f"+{MINUTES_10}", f"-{MINUTES_10}", "+0"):
        fleet.workers.start(test_clock=clock, slots="6", test_device_ms="250", **unhurried)
    with (
        fleet.dispatcher(test_clock=f"+{MINUTES_10}", lease_s=UNHURRIED_S),
        redis.Redis(port=fleet.stack.redis_port, decode_responses=True) as broker,
    ):
        job = submit()

        def is_final() -> bool:
            assert not came_back(broker), "a message came back while its worker held it"
            return not fleet.ledger.job(job).open

        wait_until(is_final)
        truth = prove(fleet, job, places, names=names, reference=reference)

    assert truth.counts["done"] == len(names)
    assert sorted(fleet.workers.begun(job).values()) == [1] * len(names)
    assert fleet.workers.dismiss() == [0, 0, 0]


@pytest.mark.parametrize("clock", [f"+{HOURS_3}", f"-{HOURS_3}"])
def test_a_clock_that_the_store_refuses_fails_nothing_and_others_do_its_images(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, clock: str
) -> None:
    names = put_images(fleet.store, places, 12)
    refused = fleet.workers.text().count("store_denied")
    astray = fleet.workers.start(test_clock=clock, slots="2", test_hold_s="1")
    with fleet.dispatcher():
        job = submit()
        wait_until(lambda: fleet.workers.text().count("store_denied") > refused)
        fleet.workers.start()
        truth = prove(fleet, job, places, names=names, reference=reference)

    assert truth.counts["done"] == len(names)
    assert astray in fleet.workers.alive()
    assert "the clock" in fleet.workers.text()
    assert fleet.workers.dismiss() == [0, 0]
