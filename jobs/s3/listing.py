"""Lists a prefix by its sub-prefixes in parallel: S3 answers one listing with a few thousand keys a second, however
many listings run at once. Yields each object once, in no order, in constant memory.

A prefix is divided at `/` where that pays: if it has at most some thousand folders with many objects each. Any other
prefix is listed sequentially.
"""

from __future__ import annotations

import collections
import itertools
import queue
import threading
from collections.abc import Iterator

from jobs.s3.client import PAGE_KEYS, S3Object, Store
from jobs.s3.errors import Role
from jobs.s3.location import Location

LISTERS = 12
"""Listings at a time; the store needs more connections than that."""
ENOUGH_UNITS = LISTERS
"""Sub-prefixes are not divided further once there are so many: dividing is sequential."""
MIN_FOLDER_OBJECTS = 20
"""Mean objects per folder on the first page: with fewer, one request per folder costs more than it saves."""
MAX_FOLDER_PAGES = 10
"""A prefix with more pages of folders is not divided."""
_END = None

Page = list[S3Object]


def list_in_parallel(store: Store, prefix: Location, *, role: Role) -> Iterator[S3Object]:
    """Yield the objects under `prefix` in no order. Raises what the store raises."""
    units: collections.deque[Location] = collections.deque()
    yield from _divide(store, prefix, role, units)
    if len(units) == 1:
        yield from itertools.chain.from_iterable(page for page, _ in store.list_pages(units[0], role=role))
    elif units:
        yield from _list_all(store, units, role)


def _divide(store: Store, root: Location, role: Role, units: collections.deque[Location]) -> Iterator[S3Object]:
    """Fill `units` with the sub-prefixes to list; yield the objects outside them."""
    waiting = collections.deque([root])
    while waiting and len(waiting) + len(units) < ENOUGH_UNITS:
        prefix = waiting.popleft()
        pages = store.list_pages(prefix, role=role)
        first, _ = next(pages, ([], []))
        if len(first) < PAGE_KEYS and next(pages, None) is None:
            yield from first
        elif (folders := _folders(store, prefix, first, role)) is None:
            units.append(prefix)
        else:
            objects, below = folders
            yield from objects
            waiting.extend(below)
    units.extend(waiting)


def _folders(store: Store, prefix: Location, first: Page, role: Role) -> tuple[Page, list[Location]] | None:
    """Return the objects directly below `prefix`, and its folders; None where dividing it does not pay."""
    names = {
        found.key[: found.key.find("/", len(prefix.key))] for found in first if "/" in found.key[len(prefix.key) :]
    }
    if not names or len(first) / len(names) < MIN_FOLDER_OBJECTS:
        return None
    objects: Page = []
    below: list[Location] = []
    pages = store.list_pages(prefix, role=role, delimiter="/")
    for found, folders in itertools.islice(pages, MAX_FOLDER_PAGES):
        objects += found
        below += [Location(prefix.bucket, folder) for folder in folders]
    return None if next(pages, None) is not None else (objects, below)


def _list_all(store: Store, units: collections.deque[Location], role: Role) -> Iterator[S3Object]:
    pages: queue.Queue[Page | BaseException | None] = queue.Queue(2 * LISTERS)
    stop = threading.Event()

    def put(item: Page | BaseException | None) -> None:
        while not stop.is_set():
            try:
                pages.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            while (unit := _next(units)) is not None:
                for page, _ in store.list_pages(unit, role=role):
                    put(page)
                    if stop.is_set():
                        return
            put(_END)
        except BaseException as exc:
            put(exc)

    threads = [threading.Thread(target=work, name="listing", daemon=True) for _ in range(min(LISTERS, len(units)))]
    for thread in threads:
        thread.start()
    working = len(threads)
    try:
        while working:
            item = pages.get()
            if isinstance(item, BaseException):
                raise item
            if item is _END:
                working -= 1
            else:
                yield from item
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _next(units: collections.deque[Location]) -> Location | None:
    try:
        return units.popleft()
    except IndexError:
        return None
