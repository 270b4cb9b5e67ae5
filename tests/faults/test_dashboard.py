"""The dashboard under load: a real Prometheus has data for every panel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.faults.fleet import Fleet
from tests.faults.stand_in_settings import MODEL
from tests.support.loaded_stack import Series, monitored_load, query_panels
from tests.support.waiting import wait_until

ALWAYS_ZERO = {"sum(increase(cutfleet_republished_images_total[5s]))"}
"""No message is lost under this load."""


def test_every_panel_shows_the_faults_that_happened(fleet: Fleet, tmp_path: Path) -> None:
    with monitored_load(fleet.stack, tmp_path, workers=2) as load:
        since = load.run(
            160,
            model=MODEL,
            start_dispatcher=fleet.dispatchers.start,
            start_worker=lambda **settings: fleet.workers.start(test_device_ms="50", **settings),
        )

        answers: dict[tuple[str, str], list[Series]] = {}

        def no_panel_is(empty: Callable[[Series], bool]) -> bool:
            answers.update(query_panels(load.prometheus, since=since))
            return all(series and not all(map(empty, series)) for series in answers.values())

        wait_until(lambda: no_panel_is(lambda one: not one.points), what=f"every expression has data: {answers}")
    flat = {
        expression
        for (_, expression), series in answers.items()
        if not any(value > 0 for one in series for _, value in one.points)
    }
    assert flat <= ALWAYS_ZERO
