"""The dashboard on a loaded stack: a real Prometheus answers each of its panels with figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.faults.fleet import Fleet
from tests.faults.terms import MODEL
from tests.support.factories import wait_until
from tests.support.loaded_stack import Line, ask_panels, watched

NOTHING_HAPPENED = {"sum(increase(cutfleet_republished_images_total[5s]))"}
"""No message is lost under this load, so that this one says 0."""


def test_no_panel_is_empty_and_each_shows_what_happened(fleet: Fleet, tmp_path: Path) -> None:
    with watched(fleet.stack, tmp_path, workers=2) as load:
        since = load.run(
            160,
            model=MODEL,
            start_dispatcher=fleet.dispatchers.start,
            start_worker=lambda **settings: fleet.workers.start(test_device_ms="50", **settings),
        )

        answers: dict[tuple[str, str], list[Line]] = {}

        def none_is(empty: Callable[[Line], bool]) -> bool:
            answers.update(ask_panels(load.prometheus, since=since))
            return all(lines and not all(map(empty, lines)) for lines in answers.values())

        wait_until(lambda: none_is(lambda line: not line.points), what=f"every expression has figures: {answers}")
    flat = {
        expression
        for (_, expression), lines in answers.items()
        if not any(value > 0 for line in lines for _, value in line.points)
    }
    assert flat <= NOTHING_HAPPENED
