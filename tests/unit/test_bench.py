"""Arithmetic of the benchmark reports; no timing is tested."""

from __future__ import annotations

import json

from tests.bench.__main__ import find_losses, ratios_of
from tests.bench.report import Row, from_json, row, to_json


def test_a_ratio_that_drops_by_more_than_a_tenth_is_a_loss() -> None:
    before = [{"decode": 3.0, "resize": 5.0}, {"decode": 2.0, "resize": 5.2}, {"decode": 2.1}]

    losses = find_losses({"decode": 1.8, "resize": 4.6, "new": 1.0}, before)

    assert losses == {"decode": (1.8, 2.1)}


def test_the_ratio_is_how_many_times_better_a_row_is() -> None:
    cost = row("decode", [10, 20, 30], "ms", against="naive", others=[60])
    speed = row("worker", [10, 20, 30], "images/s", against="bare", others=[40], better="more")
    single = row("edges", [5], "ms")

    assert (cost.ratio, speed.ratio, single.ratio) == (3, 0.5, None)
    assert ratios_of({"images": [cost, single]}) == {"images: decode, against naive": 3}


def test_rows_survive_json() -> None:
    rows: list[Row] = [row("decode", [1.0, 2.0], "ms", against="naive", others=[3.0])]

    assert from_json(json.dumps(to_json(rows))) == rows
