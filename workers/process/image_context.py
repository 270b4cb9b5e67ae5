"""The place that one image has in its worker: its share of memory, its turn on the device, the watchdog's eye on it. A
suspect has all of the worker to itself, and its bytes are decoded in another process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np

from jobs.errors import ContentError, DeviceLost
from workers.imaging.decode import DecodedImage, Limits, count_pixels, decode_image
from workers.imaging.pipeline import Pixels
from workers.models.batcher import Predictor
from workers.process.crash_attribution import Accused, Fatal
from workers.process.isolation import ChildDecoder
from workers.process.leases import Draining
from workers.process.memory import BYTES_PER_PIXEL, MemoryBudget
from workers.process.watchdog import Watchdog

MOST_DIED = 4
"""Killed without a word, as the kernel does for memory. Some may have been killed by somebody just then: thirty kills
within a minute convicted a sound image at two."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seat:
    """A `MaskPredictor` and a `Decoder` for this image. `blame` records that it may be why this process ends, `mark`
    that it is computed alone from now on, or no more. `child` decodes a suspect."""

    accused: Accused
    live: bool
    blame: Callable[[Fatal], object]
    mark: Callable[[bool], object]
    memory: MemoryBudget
    watchdog: Watchdog
    predictor: Predictor
    child: ChildDecoder
    limits: Limits

    @contextmanager
    def room(self, data: bytes) -> Iterator[None]:
        """Memory for the image, from before it is decoded until it is published. Raises `Draining`. The header of a
        suspect is not read in this process; it has nothing beside it."""
        if self.accused.alone:
            yield
            return
        with self.computing():
            size_bytes = len(data) + BYTES_PER_PIXEL * count_pixels(data, self.limits)
        with self.memory.take(size_bytes, live=self.live) as taken:
            if not taken:
                raise Draining
            yield

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Raises `ContentError` `crashed_worker` for a suspect of which `MOST_DIED` workers died alone, and
        `DeviceLost` when the device fails by itself, before anybody can be blamed."""
        if not self.accused.alone:
            with self.watchdog.computing(self.accused, self.blame):
                yield
            return
        if self.accused.claim.died >= MOST_DIED:
            raise ContentError(
                f"{self.accused.claim.died} workers died without a word while they computed it, nothing beside it: "
                "its memory does not suffice, or somebody kills workers.",
                code="crashed_worker",
            )
        self._try_device()
        with self.watchdog.computing(self.accused, self.blame):
            try:
                yield
            finally:
                self.mark(False)

    @property
    def input_size(self) -> tuple[int, int]:
        return self.predictor.input_size

    def predict(self, rgb: Pixels, *, live: bool = False) -> Pixels:
        with self.watchdog.waiting(self.accused.claim):
            return self.predictor.predict(rgb, live=live)

    def decode(self, data: bytes, *, limits: Limits, animation: Literal["first", "refuse"]) -> DecodedImage:
        """A suspect is marked when its bytes are touched: who dies before, while a process starts for them, did not die
        of it."""
        if not self.accused.alone:
            return decode_image(data, limits=limits, animation=animation)
        with self.watchdog.waiting(self.accused.claim):
            return self.child(data, limits=limits, animation=animation, begins=lambda: self.mark(True))

    def _try_device(self) -> None:
        """A device that fails with a blank image has failed by itself: the suspect is not to blame."""
        try:
            self.predictor.predict(np.zeros((*self.input_size, 3), np.uint8))
        except DeviceLost as exc:
            raise DeviceLost(str(exc)) from exc
