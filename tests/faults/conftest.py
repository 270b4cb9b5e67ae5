"""A fleet for each file of fault tests, and the masks of a run without faults.

fault                                                                     tests
worker: killed at random and at each step, frozen, resumed late           test_worker_killed.py
worker: stopped under load, in a rolling restart, with hanging            test_worker_killed.py, test_restart.py,
  downloads, while it starts                                                test_store.py, functional/test_starting.py
the same without a ledger; unpatched kombu                                test_control.py
image: crashes, hangs, exhausts memory, keeps the lock; broken files      test_poison.py, functional/test_hard_files.py
device: fails, hangs, crashes; out of memory                              test_device_lost.py, models/test_batcher.py
Valkey: restarted, away, silent, half-open, slow; over TLS                test_valkey.py, test_rights.py
Valkey: full; its data lost, all or the last seconds; its primary         test_redis_full.py, test_audit.py,
                                                                            test_sentinel.py
messages: twice, lost, unacknowledged too long, of a later version,       test_messages.py, test_visibility.py,
  forged                                                                    test_upgrade.py, test_forged_messages.py
S3: busy, reset, silent, away, an answer lost, one prefix, a bucket       test_store.py
source: replaced while it waits or is worked on                           test_messages.py
producer and dispatcher: killed at each step, two at once, resumed late   test_dispatcher.py
no worker for an hour; done faster than listed; two jobs, one destination test_messages.py, test_two_jobs.py
clocks                                                                    test_clock.py
a person: cancels, pauses, tunes, retries                                 test_operator_actions.py
Flower: frozen                                                            test_flower.py
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.fleet import IMAGES, Fleet, Reference, Submit
from tests.faults.fork_server import ForkServer
from tests.faults.invariants import assert_exact, read_masks
from tests.faults.stand_in_settings import MODEL
from tests.support.images import put_images
from tests.support.places import Places


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    fork_server = ForkServer(tmp_path_factory.mktemp("fork-server"))
    yield fork_server
    fork_server.stop()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Iterator[Fleet]:
    with Fleet(tmp_path_factory.mktemp("fleet"), fork_server) as fleet:
        yield fleet


@pytest.fixture(autouse=True)
def _kill_processes(fleet: Fleet) -> Iterator[None]:
    """Kill what a failed test has left."""
    yield
    fleet.kill_all()


@pytest.fixture
def places(fleet: Fleet) -> Places:
    return fleet.create_places()


@pytest.fixture
def fake_worker(fleet: Fleet) -> None:
    """The heartbeat of a worker that does not exist: submissions accept the model."""
    fleet.ledger.fleet.heartbeat("fake", {"model": MODEL, "slots": 4}, ttl_s=600)


@pytest.fixture
def submit(fleet: Fleet, places: Places) -> Submit:
    return lambda *options: fleet.submit(places, *options)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Reference:
    """Masks of the first `IMAGES` sample images, from a run without faults."""
    with Fleet(tmp_path_factory.mktemp("reference"), fork_server) as fleet:
        places = fleet.create_places()
        names = put_images(fleet.store, places, IMAGES)
        with fleet.dispatcher():
            fleet.workers.start()
            assert_exact(fleet, fleet.submit(places), places, names=names, reference={})
            assert fleet.workers.terminate() == [0]
        return read_masks(fleet, places, names)
