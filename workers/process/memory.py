"""How much memory the images in flight may take: bytes, not a count. An image takes its share before it is decoded,
by its header's size, and gives it back once it is published; live images come before those of a backfill.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pynvml

BYTES_PER_PIXEL = 28
"""Most that an image takes between decoding and publishing: 25 measured with a marketplace's rendition, 16 (WebP), 12
(PNG with alpha) and 8 (JPEG) with the default recipe, at 12 megapixels (`python -m tests.bench.footprint`). Not less
for a JPEG: what its thread keeps of freed memory would then exceed the worker's limit."""
SHARE_OF_MACHINE = 0.75
"""A worker's resident limit where none is set; the rest is for the system, and for what stands beside the worker."""
SHARE_FOR_IMAGES = 0.6
"""Of what the worker itself leaves of its limit; the rest is for files before decoding, and for fragmentation."""
LEAST_BUDGET = 64_000_000
_LOOK_S = 0.5
_NO_LIMIT = 1 << 60
_CGROUP = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class MemoryBudget:
    """Safe for threads. First come, first served within a lane; one that is larger than the whole budget goes alone."""

    def __init__(self, total_bytes: int, *, leaving: threading.Event) -> None:
        """`leaving`: nobody is let in any more once it is set."""
        self.total_bytes = total_bytes
        self.in_use = 0
        self._leaving = leaving
        self._live: deque[object] = deque()
        self._backfill: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def take(self, size_bytes: int, *, live: bool) -> Iterator[bool]:
        """Waits for room. False when the worker is leaving: nothing was taken then."""
        if not self._wait(size_bytes, self._live if live else self._backfill):
            yield False
            return
        try:
            yield True
        finally:
            with self._changed:
                self.in_use -= size_bytes
                self._changed.notify_all()

    def _wait(self, size_bytes: int, lane: deque[object]) -> bool:
        ticket = object()
        with self._changed:
            lane.append(ticket)
            try:
                while not self._leaving.is_set():
                    if self._changed.wait_for(lambda: self._is_next(ticket, size_bytes), _LOOK_S):
                        self.in_use += size_bytes
                        return True
                return False
            finally:
                lane.remove(ticket)
                self._changed.notify_all()

    def _is_next(self, ticket: object, size_bytes: int) -> bool:
        first = (self._live or self._backfill)[0]
        return first is ticket and (not self.in_use or self.in_use + size_bytes <= self.total_bytes)


def resident_bytes() -> int:
    """What this process has in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def resident_limit(memory_mb: int, *, on_gpu: bool) -> int:
    """In bytes. `memory_mb`: the setting; 0: from what this machine or container has, shared by the machine's GPUs."""
    if memory_mb:
        return memory_mb * 1_000_000
    return int(SHARE_OF_MACHINE * _machine_bytes() / (_gpus() if on_gpu else 1))


def image_budget(limit_bytes: int, *, own_bytes: int) -> int:
    """`own_bytes`: resident before the first image, model and libraries included."""
    return max(LEAST_BUDGET, int(SHARE_FOR_IMAGES * (limit_bytes - own_bytes)))


def _machine_bytes() -> int:
    """The container's limit where there is one."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in _CGROUP:
        path = Path(name)
        if path.exists() and (text := path.read_text().strip()) != "max":
            found.append(int(text))
    return min(size for size in found if size < _NO_LIMIT)


def _gpus() -> int:
    try:
        pynvml.nvmlInit()
        return max(1, int(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError:
        return 1
