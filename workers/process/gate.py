"""Isolation of a suspect, an image that was in flight when two workers died: nothing else runs in this process
meanwhile, and its bytes are decoded in a subprocess (`workers/process/decode_process.py`).

The image fails when the subprocess crashes, stalls or exceeds its memory, and when the same fatal fault of this process
is reported for it again. A kill fails it only after `MAX_KILLS` in isolation (`workers/process/image_context.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

SHARED_WAIT_S = 2.0
"""Longest wait for a suspect to end; then the message returns to its queue, for another worker."""
_CHECK_S = 0.2
"""Interval at which a waiting suspect checks whether the worker drains."""


class IsolationGate:
    """A fair shared/exclusive lock: an exclusive entry first lets all in that wait for a shared one, so neither
    starves."""

    def __init__(self, *, draining: threading.Event) -> None:
        self._draining = draining
        self._changed = threading.Condition()
        self._inside = 0
        self._waiting = 0
        self._closed = False

    @contextmanager
    def shared(self) -> Iterator[bool]:
        """Enter with others. Yields False if the gate stays closed for `SHARED_WAIT_S`."""
        with self._changed:
            self._waiting += 1
            entered = self._changed.wait_for(lambda: not self._closed, SHARED_WAIT_S)
            self._waiting -= 1
            self._inside += entered
            self._changed.notify_all()
        try:
            yield entered
        finally:
            with self._changed:
                self._inside -= entered
                self._changed.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[bool]:
        """Close the gate and wait until the others have left. Yields False if the worker drains."""
        closed = False
        with self._changed:
            while not closed and not self._draining.is_set():
                closed = self._changed.wait_for(lambda: not self._closed and not self._waiting, _CHECK_S)
            self._closed = closed or self._closed
            while closed and self._inside and not self._draining.is_set():
                self._changed.wait(_CHECK_S)
            entered = closed and not self._inside
        try:
            yield entered
        finally:
            if closed:
                with self._changed:
                    self._closed = False
                    self._changed.notify_all()
