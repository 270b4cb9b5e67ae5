"""Rate of a growing count over a sliding window of time."""

from __future__ import annotations

import collections


class SlidingRate:
    """Not safe for threads."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._samples: collections.deque[tuple[float, int]] = collections.deque()

    def add(self, count: int, *, now: float) -> None:
        """Add a sample. `now`: monotonic seconds."""
        self._samples.append((now, count))
        while self._samples[0][0] < now - self._window_s:
            self._samples.popleft()

    @property
    def per_second(self) -> float | None:
        """None before the second sample."""
        if not self._samples:
            return None
        (first, before), (last, after) = self._samples[0], self._samples[-1]
        return (after - before) / (last - first) if last > first else None
