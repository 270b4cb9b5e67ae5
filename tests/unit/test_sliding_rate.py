"""The rate of a growing count."""

from __future__ import annotations

from jobs.sliding_rate import SlidingRate


def test_the_rate_covers_only_the_window() -> None:
    rate = SlidingRate(60)
    rates = []

    for now, count in ((0, 0), (5, 10), (60, 120), (120, 120), (125, 120)):
        rate.add(count, now=now)
        rates.append(rate.per_second)

    assert rates == [None, 2.0, 2.0, 0.0, 0.0]
