"""The images this worker holds. One thread renews their leases and says in the ledger that the worker is alive: a
process that is frozen or killed does neither, and its images go to others when the lease ends."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from jobs.errors import CutfleetError, ServiceUnavailable
from jobs.ledger import Claim, Ledger

log = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
MISSES = 2


class Draining(Exception):
    """The worker is going: the image is given back, no try used up."""


class Leases:
    """Safe for threads. `facts` is asked for what the worker says of itself."""

    def __init__(
        self, ledger: Ledger, *, node: str, lease_s: float, facts: Callable[[], Mapping[str, str | int | float]]
    ) -> None:
        self.lease_s = lease_s
        self._ledger = ledger
        self._node = node
        self._facts = facts
        self._held: dict[str, Claim] = {}
        self._missed: dict[str, int] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._pulse, name="leases", daemon=True)

    def __enter__(self) -> Leases:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @contextmanager
    def hold(self, claim: Claim) -> Iterator[None]:
        """Renews the claim until the block ends; finishing, deferring or releasing it is the block's business."""
        with self._lock:
            self._held[claim.image] = claim
        try:
            yield
        finally:
            with self._lock:
                if self._held.get(claim.image) is claim:  # else this worker took the image again meanwhile
                    del self._held[claim.image]

    def is_ours(self, claim: Claim) -> bool:
        """Asks the ledger, and renews: false when another worker has the image by now."""
        return not self._ledger.renew({claim.image: claim.token}, lease_s=self.lease_s)

    def in_flight(self) -> int:
        return len(self._held)

    def release_all(self) -> None:
        """Gives back everything held, at the end of the grace: what still runs here publishes nothing any more."""
        for claim in self._claims():
            try:
                self._ledger.release(claim, lease_s=self.lease_s)
            except CutfleetError as exc:
                log.error("not released: %s", exc, extra={"action": "drain", "image": claim.image, "code": exc.code})

    def _claims(self) -> list[Claim]:
        with self._lock:
            return list(self._held.values())

    def _pulse(self) -> None:
        next_heartbeat = 0.0
        while True:
            try:
                self._renew()
                if time.monotonic() >= next_heartbeat:
                    facts = {**self._facts(), "in_flight": self.in_flight()}
                    self._ledger.heartbeat(self._node, facts, ttl_s=int(3 * HEARTBEAT_S))
                    next_heartbeat = time.monotonic() + HEARTBEAT_S
            except ServiceUnavailable as exc:
                log.warning(str(exc), extra={"action": "renew", "code": exc.code})
            if self._stop.wait(min(self.lease_s / 4, HEARTBEAT_S / 2)):
                return

    def _renew(self) -> None:
        """What is missed once may just have been recorded, and is held no more a moment later: it is said of what is
        missed twice, and then once."""
        held = {claim.image: claim.token for claim in self._claims()}
        missed = self._ledger.renew(held, lease_s=self.lease_s)
        self._missed = {held[image]: self._missed.get(held[image], 0) + 1 for image in missed}
        for image in missed:
            if self._missed[held[image]] == MISSES:
                log.warning("lease lost: another worker may have it", extra={"action": "renew", "image": image})
