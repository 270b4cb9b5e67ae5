"""Wrong clocks of single machines do no harm: leases, deadlines and messages follow the server's clock."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files

import pytest
import redis

from tests.faults.broker import has_redelivered_message
from tests.faults.fleet import Fleet, Reference, Submit
from tests.faults.fork_server import ForkServer
from tests.faults.invariants import assert_exact
from tests.faults.processes import LONG_LEASE_S
from tests.support.images import put_images
from tests.support.places import Places
from tests.support.waiting import wait_until

MINUTES_10, HOURS_3 = 600, 3 * 3600
"""S3 accepts a clock that is up to fifteen minutes off."""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A fleet whose processes can have their own clocks: `test_clock`."""
    library = files("libfaketime") / "vendor" / "libfaketime" / "src" / "libfaketime.so.1"
    env = {"LD_PRELOAD": str(library), "FAKETIME": "+0", "FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    fork_server = ForkServer(tmp_path_factory.mktemp("clocks"), env)
    with Fleet(tmp_path_factory.mktemp("fleet"), fork_server) as fleet:
        yield fleet
    fork_server.stop()


def test_clocks_that_are_minutes_off_lose_no_image_and_redeliver_no_message(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, 48)
    long_times = {"lease_s": LONG_LEASE_S, "test_visibility_s": "20"}
    for clock in (f"+{MINUTES_10}", f"-{MINUTES_10}", "+0"):
        fleet.workers.start(test_clock=clock, slots="6", test_device_ms="250", **long_times)
    with (
        fleet.dispatcher(test_clock=f"+{MINUTES_10}", lease_s=LONG_LEASE_S),
        redis.Redis(port=fleet.stack.redis_port, decode_responses=True) as broker,
    ):
        job = submit()

        def is_final() -> bool:
            assert not has_redelivered_message(broker), "a message was redelivered while its worker worked on it"
            return not fleet.ledger.jobs.get(job).open

        wait_until(is_final)
        outcome = assert_exact(fleet, job, places, names=names, reference=reference)

    assert outcome.counts["done"] == len(names)
    assert sorted(fleet.workers.claim_counts(job).values()) == [1] * len(names)
    assert fleet.workers.terminate() == [0, 0, 0]


@pytest.mark.parametrize("clock", [f"+{HOURS_3}", f"-{HOURS_3}"])
def test_a_worker_whose_clock_the_store_refuses_fails_no_image_and_others_finish_them(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, clock: str
) -> None:
    names = put_images(fleet.store, places, 12)
    refused = fleet.workers.log_text().count("store_denied")
    refused_worker = fleet.workers.start(test_clock=clock, slots="2", test_hold_s="1")
    with fleet.dispatcher():
        job = submit()
        wait_until(lambda: fleet.workers.log_text().count("store_denied") > refused)
        fleet.workers.start()
        outcome = assert_exact(fleet, job, places, names=names, reference=reference)

    assert outcome.counts["done"] == len(names)
    assert refused_worker in fleet.workers.alive()
    assert "the clock" in fleet.workers.log_text()
    assert fleet.workers.terminate() == [0, 0]
