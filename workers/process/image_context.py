"""Resources of one image in its worker: memory, a batch on the device, the watchdog. A suspect uses the worker by
itself, and its bytes are decoded in a subprocess."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np

from jobs.errors import ContentError, DeviceLost
from workers.imaging.decode import DecodedImage, Limits, count_pixels, decode_image
from workers.imaging.pixels import Pixels
from workers.process.context import WorkerContext
from workers.process.crash_attribution import InFlightImage
from workers.process.leases import Draining
from workers.process.memory import BYTES_PER_PIXEL
from workers.process.watchdog import ReportCrash

MAX_KILLS = 4
"""Workers killed while they compute a suspect, as by the OOM killer. Fewer may have another reason: thirty kills within
a minute failed a sound image at two."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageContext:
    """A `MaskPredictor` and a `Decoder` for this image. `mark_isolated`: records whether the image is computed in
    isolation now."""

    image: InFlightImage
    live: bool
    worker: WorkerContext
    report_crash: ReportCrash
    mark_isolated: Callable[[bool], object]

    @contextmanager
    def reserve_memory(self, data: bytes) -> Iterator[None]:
        """Keep memory for the image within the block, from before decoding until it is published. Raises `Draining`.
        Does nothing for a suspect: nothing else runs, and its header must not be parsed in this process."""
        if self.image.isolated:
            yield
            return
        with self.computing():
            size_bytes = len(data) + BYTES_PER_PIXEL * count_pixels(data, self.worker.limits)
        with self.worker.memory.reserve(size_bytes, live=self.live) as reserved:
            if not reserved:
                raise Draining
            yield

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Let the watchdog watch the block.

        Raises for a suspect: `ContentError` `crashed_worker` if `MAX_KILLS` workers were killed while they computed it
        in isolation; `DeviceLost` if the device fails before the suspect uses it."""
        if not self.image.isolated:
            with self.worker.watchdog.computing(self.image, self.report_crash):
                yield
            return
        if self.image.claim.died >= MAX_KILLS:
            raise ContentError(
                f"{self.image.claim.died} workers were killed while they computed this image and nothing else: the "
                "worker's memory is too small for it, or something kills the workers.",
                code="crashed_worker",
            )
        self._check_device()
        with self.worker.watchdog.computing(self.image, self.report_crash):
            try:
                yield
            finally:
                self.mark_isolated(False)

    @property
    def input_size(self) -> tuple[int, int]:
        return self.worker.batcher.input_size

    def predict(self, rgb: Pixels, *, live: bool = False) -> Pixels:
        with self.worker.watchdog.waiting(self.image.claim):
            return self.worker.batcher.predict(rgb, live=live)

    def decode(self, data: bytes, *, limits: Limits, animation: Literal["first", "refuse"]) -> DecodedImage:
        """Decode here, or a suspect in a subprocess. A suspect is marked only once that subprocess runs: a worker
        killed earlier was not killed because of it."""
        if not self.image.isolated:
            return decode_image(data, limits=limits, animation=animation)
        with self.worker.watchdog.waiting(self.image.claim):
            return self.worker.decode_process.decode(
                data, limits=limits, animation=animation, on_ready=lambda: self.mark_isolated(True)
            )

    def _check_device(self) -> None:
        """Compute a blank image. Raises `DeviceLost` that is not attributed to the suspect."""
        try:
            self.worker.batcher.predict(np.zeros((*self.input_size, 3), np.uint8))
        except DeviceLost as exc:
            raise DeviceLost(str(exc)) from exc
