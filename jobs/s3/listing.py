"""Lists a prefix by its sub-prefixes, several at a time: S3 answers one listing with some thousands of keys a second,
however many run side by side. Each object comes once, in no order; memory does not grow with their number.

A prefix is divided at `/` where that pays: below it stand folders, not more than some thousand, each with many objects.
Else it is listed from end to end.
"""

from __future__ import annotations

import collections
import itertools
import queue
import threading
from collections.abc import Iterator

from jobs.s3.client import PAGE_KEYS, Location, Role, S3Object, Store

LISTERS = 12
"""Requests at a time; the store's connections must be more."""
ENOUGH = LISTERS
"""Sub-prefixes: with so many, they are not divided further, which is done one after another."""
MANY = 20
"""Objects of a folder, as the first page shows them: with fewer, a request a folder costs more than it brings."""
MAX_LOOKS = 10
"""Pages of folders of one prefix; with more, it is not divided."""
_END = None

Page = list[S3Object]


def list_side_by_side(store: Store, prefix: Location, *, role: Role) -> Iterator[S3Object]:
    """Raises what the store raises."""
    units: collections.deque[Location] = collections.deque()
    yield from _divide(store, prefix, role, units)
    if len(units) == 1:
        yield from itertools.chain.from_iterable(page for page, _ in store.list_pages(units[0], role=role))
    elif units:
        yield from _list_all(store, units, role)


def _divide(store: Store, prefix: Location, role: Role, units: collections.deque[Location]) -> Iterator[S3Object]:
    """Fills `units` with the sub-prefixes to be listed; yields what stands beside them."""
    waiting = collections.deque([prefix])
    while waiting and len(waiting) + len(units) < ENOUGH:
        place = waiting.popleft()
        pages = store.list_pages(place, role=role)
        first, _ = next(pages, ([], []))
        if len(first) < PAGE_KEYS and next(pages, None) is None:
            yield from first  # behind a full page there is more, or else nothing is lost by dividing
        elif (folders := _folders(store, place, first, role)) is None:
            units.append(place)
        else:
            objects, below = folders
            yield from objects
            waiting.extend(below)
    units.extend(waiting)


def _folders(store: Store, place: Location, first: Page, role: Role) -> tuple[Page, list[Location]] | None:
    """Objects directly below `place`, and the folders there; None where dividing it does not pay."""
    known = {found.key[: found.key.find("/", len(place.key))] for found in first if "/" in found.key[len(place.key) :]}
    if not known or len(first) / len(known) < MANY:
        return None
    objects: Page = []
    below: list[Location] = []
    pages = store.list_pages(place, role=role, delimiter="/")
    for found, folders in itertools.islice(pages, MAX_LOOKS):
        objects += found
        below += [Location(place.bucket, folder) for folder in folders]
    return None if next(pages, None) is not None else (objects, below)


def _list_all(store: Store, units: collections.deque[Location], role: Role) -> Iterator[S3Object]:
    pages: queue.Queue[Page | BaseException | None] = queue.Queue(2 * LISTERS)
    stop = threading.Event()

    def hand_over(item: Page | BaseException | None) -> None:
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
                    hand_over(page)
                    if stop.is_set():
                        return
            hand_over(_END)
        except BaseException as exc:
            hand_over(exc)

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
