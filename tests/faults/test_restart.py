"""A rolling restart under load, supervised as by systemd: no image is lost or published twice, and live images wait
briefly. The drill of `infra/systemd/README.md`."""

from __future__ import annotations

import functools
import os
import signal
import statistics
import threading
import time

from tests.faults.fleet import Fleet, Reference
from tests.faults.invariants import assert_exact
from tests.faults.processes import is_ready
from tests.support.images import put_images
from tests.support.places import Places
from tests.support.waiting import wait_until

GPUS = 3
JOB_IMAGES = 96
DEVICE_MS = "200"


def restart_all(fleet: Fleet) -> list[int]:
    """Restart each worker when the one before is ready again, then the dispatchers. Return the exit codes."""
    codes = []
    for pid in fleet.workers.alive():
        codes.append(fleet.workers.restart(pid))
        wait_until(
            lambda: (
                len(fleet.workers.alive()) == GPUS and all(is_ready(fleet.ledger, pid) for pid in fleet.workers.alive())
            ),
            what="the restarted worker is ready",
        )
    codes += [fleet.dispatchers.restart(pid) for pid in fleet.dispatchers.alive()]
    return codes


def test_a_rolling_restart_under_load_loses_no_image_and_publishes_none_twice(
    fleet: Fleet, places: Places, reference: Reference
) -> None:
    names = put_images(fleet.store, places, JOB_IMAGES)
    for gpu in range(GPUS):
        fleet.workers.start_supervised(node=f"gpu{gpu}-{os.getpid()}", test_device_ms=DEVICE_MS)
    for _ in range(2):
        fleet.dispatchers.start_supervised()
    live, backfills = fleet.create_places(), Backfills(fleet, places)
    waits_s: list[float] = []
    codes: list[int] = []
    backfills.keep_load()
    wait_until(lambda: fleet.ledger.jobs.get(backfills.newest).done > GPUS)
    restart = threading.Thread(target=lambda: codes.extend(restart_all(fleet)))

    restart.start()
    while restart.is_alive():
        backfills.keep_load()
        (name,) = put_images(fleet.store, live, 1, start=len(waits_s))
        began = time.monotonic()
        job = fleet.submit_in_process(live, live.key(name).key, lane="live")
        wait_until(functools.partial(is_done, fleet, job), what=f"live image {name}")
        waits_s.append(time.monotonic() - began)
    restart.join()

    print(f"{len(waits_s)} live images, from submission until done:")
    print(f"median {statistics.median(waits_s):.1f} s, worst {max(waits_s):.1f} s")
    assert len(codes) == GPUS + 2
    assert all(fleet.workers.unit.is_success_after(code) for code in codes), codes
    assert set(fleet.workers.publish_counts(live).values()) == {1}
    for job, to in backfills.jobs.items():
        outcome = assert_exact(fleet, job, to, names=names, reference=reference, only_job=False)
        assert outcome.counts["done"] == JOB_IMAGES
        assert set(fleet.workers.publish_counts(to).values()) == {1}


def is_done(fleet: Fleet, job: str) -> bool:
    return fleet.ledger.jobs.get(job).done == 1


class Backfills:
    """Submits one backfill after another, so that there is always load."""

    def __init__(self, fleet: Fleet, places: Places) -> None:
        self.jobs: dict[str, Places] = {}
        self.newest = ""
        self._fleet = fleet
        self._source = places.source

    def keep_load(self) -> None:
        if self.newest and self._fleet.ledger.jobs.get(self.newest).open > JOB_IMAGES / 2:
            return
        to = Places(self._source, self._fleet.create_places().to)
        self.newest = self._fleet.submit_in_process(to, lane="backfill")
        self.jobs[self.newest] = to


def test_a_killed_worker_is_restarted_and_one_with_an_invalid_setting_is_not(fleet: Fleet) -> None:
    killed = fleet.workers.start_supervised()
    os.kill(killed, signal.SIGKILL)
    wait_until(
        lambda: any(pid != killed and is_ready(fleet.ledger, pid) for pid in fleet.workers.alive()),
        what="another worker is ready",
    )

    wrong = fleet.workers.fork_supervised(slots="many")

    assert fleet.workers.wait_for(wrong) == 2
    assert len(fleet.workers.alive()) == 1
    assert fleet.workers.terminate() == [0]
