"""A rolling restart under load, each process kept by its systemd unit: nothing is lost, nothing is doubled, and what is
live waits little. The drill of `infra/systemd/README.md`."""

from __future__ import annotations

import os
import signal
import statistics
import threading
import time

from tests.faults.fleet import Fleet, Reference, is_ready, make_places, submit_here
from tests.faults.truth import prove
from tests.support.factories import Places, put_images, wait_until

GPUS = 3
SHELF = 96
DEVICE_MS = "200"


def roll(fleet: Fleet) -> list[int]:
    """Each worker in turn, the next when its successor is ready, then the dispatchers. Returns the exit codes."""
    codes = []
    for pid in fleet.workers.alive():
        codes.append(fleet.workers.restart(pid))
        wait_until(
            lambda: len(ready := fleet.workers.alive()) == GPUS and all(is_ready(fleet.ledger, one) for one in ready),
            what="its successor is ready",
        )
    codes += [fleet.dispatchers.restart(pid) for pid in fleet.dispatchers.alive()]
    return codes


def test_a_rolling_restart_under_load_loses_and_doubles_nothing(
    fleet: Fleet, places: Places, reference: Reference
) -> None:
    names = put_images(fleet.store, places, SHELF)
    for gpu in range(GPUS):
        fleet.workers.start(supervised=True, node=f"gpu{gpu}-{os.getpid()}", test_device_ms=DEVICE_MS)
    for _ in range(2):
        fleet.dispatchers.start(supervised=True)
    live, shelves, waits_s, codes = make_places(fleet), Shelves(fleet, places), [], list[int]()
    shelves.fill()
    wait_until(lambda: fleet.ledger.job(shelves.newest).done > GPUS)
    restart = threading.Thread(target=lambda: codes.extend(roll(fleet)))

    restart.start()
    while restart.is_alive():
        shelves.fill()
        (name,) = put_images(fleet.store, live, 1, start=len(waits_s))
        began = time.monotonic()
        job = submit_here(fleet, live, live.key(name).key, lane="live")
        wait_until(lambda job=job: fleet.ledger.job(job).done == 1, what=f"live image {name}")
        waits_s.append(time.monotonic() - began)
    restart.join()

    print(f"{len(waits_s)} live images, each from before its submission until it was done:")
    print(f"median {statistics.median(waits_s):.1f} s, worst {max(waits_s):.1f} s")
    assert len(codes) == GPUS + 2
    assert all(fleet.workers.unit.is_well_after(code) for code in codes), codes
    assert set(fleet.workers.published(live).values()) == {1}
    for job, to in shelves.jobs.items():
        truth = prove(fleet, job, to, names=names, reference=reference, alone=False)
        assert truth.counts["done"] == SHELF
        assert set(fleet.workers.published(to).values()) == {1}


class Shelves:
    """Backfills, one after the other, so that there is load for as long as somebody looks."""

    def __init__(self, fleet: Fleet, places: Places) -> None:
        self.jobs: dict[str, Places] = {}
        self.newest = ""
        self._fleet = fleet
        self._source = places.source

    def fill(self) -> None:
        if self.newest and self._fleet.ledger.job(self.newest).open > SHELF / 2:
            return
        to = Places(self._source, make_places(self._fleet).to)
        self.newest = submit_here(self._fleet, to, lane="backfill")
        self.jobs[self.newest] = to


def test_a_killed_worker_is_started_again_and_one_with_a_wrong_setting_stays_failed(fleet: Fleet) -> None:
    killed = fleet.workers.start(supervised=True)
    os.kill(killed, signal.SIGKILL)
    wait_until(
        lambda: any(pid != killed and is_ready(fleet.ledger, pid) for pid in fleet.workers.alive()),
        what="another is there",
    )

    wrong = fleet.workers.start(supervised=True, ready=False, slots="many")

    assert fleet.workers.wait_for(wrong) == 2
    assert len(fleet.workers.alive()) == 1
    assert fleet.workers.dismiss() == [0]
