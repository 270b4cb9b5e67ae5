"""A fleet of its own for each file of faults, and what a run without faults gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from factories import Places, put_pictures
from faults.fleet import PICTURES, Fleet, Reference, Submit, Zygote, make_places, submit_to
from faults.terms import MODEL
from faults.truth import masks, prove


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
    """Masks of the first `PICTURES` pictures, from a run without faults."""
    with Fleet(tmp_path_factory.mktemp("reference"), zygote) as fleet:
        places = make_places(fleet)
        names = put_pictures(fleet.store, places, PICTURES)
        with fleet.dispatcher():
            fleet.workers.start()
            prove(fleet, submit_to(fleet, places), places, names=names, reference={})
            assert fleet.workers.dismiss() == [0]
        return masks(fleet, places, names)
