"""A fleet of its own for each file of faults, and what a run without faults gives.

what dies, or lies                                                        where it is seen
worker: killed at random and at each boundary, frozen, woken late         test_worker_killed.py
worker: told to go, under load, in a rolling restart, with downloads      test_worker_killed.py, test_restart.py,
  that hang, while it starts                                                test_store.py, functional/test_starting.py
the same without a ledger; stock kombu                                    test_control.py
image: crashes, hangs, exhausts memory, keeps the lock; broken files    test_poison.py, functional/test_hard_files.py
device: fails, hangs, crashes; out of memory                              test_device_lost.py, unit/test_predictor.py
Valkey: started again, away, silent, half-open, slow; over TLS            test_valkey.py, test_rights.py
Valkey: full; lost, or its last seconds; its primary                      test_redis_full.py, test_audit.py,
                                                                              test_sentinel.py
messages: twice, lost, held too long, of a later version, forged          test_messages.py, test_visibility.py,
                                                                            test_upgrade.py, test_bounds.py
S3: busy, reset, silent, away, an answer lost, one prefix, a bucket       test_store.py
source: replaced while it waits or is worked on                           test_messages.py
producer and dispatcher: killed at each boundary, two at once, woken      test_dispatcher.py
nobody works for an hour; done faster than listed; two jobs, one place    test_messages.py, test_two_jobs.py
clocks                                                                    test_clock.py
a person: cancels, pauses, tries again                                    test_moves.py
Flower: frozen                                                            test_flower.py
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.fleet import IMAGES, Fleet, Reference, Submit, Zygote, make_places, submit_to
from tests.faults.terms import MODEL
from tests.faults.truth import masks, prove
from tests.support.factories import Places, put_images


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    zygote = Zygote(tmp_path_factory.mktemp("zygote"))
    yield zygote
    zygote.stop()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Iterator[Fleet]:
    with Fleet(tmp_path_factory.mktemp("fleet"), zygote) as fleet:
        yield fleet


@pytest.fixture(autouse=True)
def _nothing_left_running(fleet: Fleet) -> Iterator[None]:
    yield
    fleet.forget()


@pytest.fixture
def places(fleet: Fleet) -> Places:
    return make_places(fleet)


@pytest.fixture
def asleep(fleet: Fleet) -> None:
    """The model is known, though none of its workers is awake."""
    fleet.ledger.heartbeat("asleep", {"model": MODEL, "slots": 4}, ttl_s=600)


@pytest.fixture
def submit(fleet: Fleet, places: Places) -> Submit:
    """Submits everything under the source; returns the job's id."""
    return lambda *more: submit_to(fleet, places, *more)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Reference:
    """Masks of the first `IMAGES` images, from a run without faults."""
    with Fleet(tmp_path_factory.mktemp("reference"), zygote) as fleet:
        places = make_places(fleet)
        names = put_images(fleet.store, places, IMAGES)
        with fleet.dispatcher():
            fleet.workers.start()
            prove(fleet, submit_to(fleet, places), places, names=names, reference={})
            assert fleet.workers.dismiss() == [0]
        return masks(fleet, places, names)
