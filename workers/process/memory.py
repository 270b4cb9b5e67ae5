"""Memory of the images in flight, limited in bytes. An image reserves its share before it is decoded, by the size in
its header, and returns it after it is published. Live images come before backfill images."""

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
for a JPEG: the freed memory that its thread keeps would then exceed the worker's limit."""
SHARE_OF_MACHINE = 0.75
"""Resident limit of a worker by default; the rest is for the system and for other processes."""
SHARE_FOR_IMAGES = 0.6
"""Of the limit less the worker's own memory; the rest is for files before decoding, and for fragmentation."""
MIN_BUDGET_BYTES = 64_000_000
_CHECK_S = 0.5
"""Interval at which a waiting image checks whether the worker drains."""
_NO_LIMIT = 1 << 60
_CGROUP = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class MemoryBudget:
    """Safe for threads. First come, first served within a lane. An image larger than the budget waits until no other
    has memory."""

    def __init__(self, total_bytes: int, *, draining: threading.Event) -> None:
        self.total_bytes = total_bytes
        self.in_use = 0
        self._draining = draining
        self._live: deque[object] = deque()
        self._backfill: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, size_bytes: int, *, live: bool) -> Iterator[bool]:
        """Wait for `size_bytes` and keep them within the block. Yields False, with nothing reserved, if the worker
        drains."""
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
                while not self._draining.is_set():
                    if self._changed.wait_for(lambda: self._is_next(ticket, size_bytes), _CHECK_S):
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
    """Return the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def resident_limit(memory_mb: int, *, on_gpu: bool) -> int:
    """Return the worker's limit in bytes. `memory_mb`: the setting; 0: a share of the memory of this machine or
    container, divided by its number of GPUs."""
    if memory_mb:
        return memory_mb * 1_000_000
    return int(SHARE_OF_MACHINE * _machine_bytes() / (_count_gpus() if on_gpu else 1))


def image_budget(limit_bytes: int, *, own_bytes: int) -> int:
    """Return the bytes for images in flight. `own_bytes`: resident before the first image, with model and libraries."""
    return max(MIN_BUDGET_BYTES, int(SHARE_FOR_IMAGES * (limit_bytes - own_bytes)))


def _machine_bytes() -> int:
    """Return the container's limit if it has one, else the machine's memory."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in _CGROUP:
        path = Path(name)
        if path.exists() and (text := path.read_text().strip()) != "max":
            sizes.append(int(text))
    return min(size for size in sizes if size < _NO_LIMIT)


def _count_gpus() -> int:
    try:
        pynvml.nvmlInit()
        return max(1, int(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError:
        return 1
