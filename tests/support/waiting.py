"""Waits for a condition with a deadline; no test sleeps for a fixed time."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(is_so: Callable[[], object], *, within_s: float = 60, what: str = "the condition") -> None:
    """Poll until `is_so` returns a true value. Raises `AssertionError` with `what` after the deadline."""
    deadline = time.monotonic() + within_s
    while True:
        is_late = time.monotonic() > deadline  # before the check: this process may be suspended between the two
        if is_so():
            return
        if is_late:
            raise AssertionError(f"not within {within_s:g} s: {what}")
        time.sleep(0.05)


def wait_past_midnight() -> None:
    """Wait past midnight UTC if it is less than a minute away: a watch creates one job a day, and a test that needs a
    single job must not cross midnight."""
    wait_until(lambda: 86_400 - time.time() % 86_400 > 60, within_s=90, what="midnight has passed")
