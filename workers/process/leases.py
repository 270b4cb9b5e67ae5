"""Leases of this worker's images. One thread renews them and sends the worker's heartbeat: a process that is frozen or
killed does neither, and other workers get its images when the leases end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from jobs.errors import CutfleetError, ServiceUnavailable
from jobs.ledger import Ledger
from jobs.ledger.window import Claim

log = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
MISSES = 2


class Draining(Exception):
    """The worker drains: the image is released, and no attempt is used up."""


class Leases:
    """Safe for threads. `heartbeat` returns the worker's heartbeat fields."""

    def __init__(
        self, ledger: Ledger, *, node: str, lease_s: float, heartbeat: Callable[[], Mapping[str, str | int | float]]
    ) -> None:
        self.lease_s = lease_s
        self._ledger = ledger
        self._node = node
        self._heartbeat = heartbeat
        self._claims: dict[str, Claim] = {}
        self._misses: dict[str, int] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)

    def __enter__(self) -> Leases:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @contextmanager
    def renewing(self, claim: Claim) -> Iterator[None]:
        """Renew the claim until the block ends. The block must finish, retry or release the image itself."""
        with self._lock:
            self._claims[claim.image] = claim
        try:
            yield
        finally:
            with self._lock:
                if self._claims.get(claim.image) is claim:  # else this worker claimed the image again meanwhile
                    del self._claims[claim.image]

    def is_ours(self, claim: Claim) -> bool:
        """Renew the lease in the ledger; False when another worker has the image."""
        return not self._ledger.window.renew({claim.image: claim.token}, lease_s=self.lease_s)

    def in_flight(self) -> int:
        """Return the number of images that this worker has claimed."""
        return len(self._claims)

    def release_all(self) -> None:
        """Release every image, at the drain deadline: what still runs here can publish nothing any more."""
        for claim in self._current_claims():
            try:
                self._ledger.window.release(claim, lease_s=self.lease_s)
            except CutfleetError as exc:
                log.error("not released: %s", exc, extra={"action": "drain", "image": claim.image, "code": exc.code})

    def _current_claims(self) -> list[Claim]:
        with self._lock:
            return list(self._claims.values())

    def _run(self) -> None:
        next_heartbeat = 0.0
        while True:
            try:
                self._renew()
                if time.monotonic() >= next_heartbeat:
                    fields = {**self._heartbeat(), "in_flight": self.in_flight()}
                    self._ledger.fleet.heartbeat(self._node, fields, ttl_s=int(3 * HEARTBEAT_S))
                    next_heartbeat = time.monotonic() + HEARTBEAT_S
            except ServiceUnavailable as exc:
                log.warning(str(exc), extra={"action": "renew", "code": exc.code})
            if self._stop.wait(min(self.lease_s / 4, HEARTBEAT_S / 2)):
                return

    def _renew(self) -> None:
        """Log a lost lease once, after `MISSES` failed renewals: after one, the image may just have been recorded."""
        tokens = {claim.image: claim.token for claim in self._current_claims()}
        missed = self._ledger.window.renew(tokens, lease_s=self.lease_s)
        self._misses = {tokens[image]: self._misses.get(tokens[image], 0) + 1 for image in missed}
        for image in missed:
            if self._misses[tokens[image]] == MISSES:
                log.warning("lease lost: another worker may have it", extra={"action": "renew", "image": image})
