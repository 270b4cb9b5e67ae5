"""The thread that owns the device: many callers hand in images and wait, it takes whatever is waiting as one batch.

Out of memory halves the batch for good and goes on with the same images. Any other device error, or no progress for
`STALL_S`, loses the device: every caller gets `DeviceLost`, and the process is to end.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeout
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jobs.errors import ContentError, DeviceLost, OutOfMemory
from workers.models import LoadedModel

PADDED_SIZES = (1, 2, 4, 8, 16)
"""Batches a compiled model ever sees, so that it never compiles again under load."""

STALL_S = 300.0
"""A batch that takes longer has hung: the slowest sound one, a batch of one on a loaded CPU, takes under a minute."""

_LOOK_S = 1.0

Pixels = NDArray[np.uint8]


class Predictor:
    """Owns `model` until closed. `batch_limit`: most images in a batch; falls on out-of-memory.

    For health and metrics, safe to read from any thread: `lost` (an event), `last_progress` (monotonic seconds),
    `waiting`, `batch_sizes` (size -> batches of it), `images`, `device_s`.
    """

    def __init__(self, model: LoadedModel, *, batch_limit: int, stall_s: float = STALL_S) -> None:
        self.batch_limit = _largest_padded(batch_limit) if model.compiled else batch_limit
        self.lost = threading.Event()
        self.last_progress = time.monotonic()
        self.batch_sizes: Counter[int] = Counter()
        self.images = 0
        self._busy: tuple[float, float | None] = (0.0, None)
        self._model = model
        self._stall_s = stall_s
        self._scale, self._shift = _normalisation(model)
        self._changed = threading.Condition()
        self._live: deque[_Request] = deque()
        self._backfill: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._warming: Future[None] | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="device", daemon=True)
        self._thread.start()

    @property
    def input_size(self) -> tuple[int, int]:
        return self._model.input_size

    @property
    def waiting(self) -> int:
        """Images handed in and not yet answered, those on the device included."""
        with self._changed:
            return len(self._live) + len(self._backfill) + len(self._running)

    @property
    def device_s(self) -> float:
        """Time in the model so far, the batch that runs now included: a slow one must not look like idling."""
        total_s, since = self._busy
        return total_s if since is None else total_s + time.monotonic() - since

    def warm_up(self) -> None:
        """Runs the batch sizes to come once, before any image is handed in: all padded ones of a compiled model, else
        the largest, halved until it fits, and one alone, so that what the model takes is known. Raises `OutOfMemory` if
        not even one image fits, or what the device raises.
        """
        done: Future[None] = Future()
        with self._changed:
            self._warming = done
            self._changed.notify_all()
        done.result()

    def _answer_warm_up(self, done: Future[None]) -> None:
        """On the device's own thread: CUDA keeps handles, workspaces and chosen kernels for each thread apart."""
        self._warming = None
        try:
            self._find_batch_that_fits()
        except Exception as exc:  # the caller of `warm_up` decides
            done.set_exception(exc)
        else:
            done.set_result(None)

    def _find_batch_that_fits(self) -> None:
        while not self._fits(self.batch_limit):
            if self.batch_limit == 1:
                raise self._too_small()
            self.batch_limit //= 2
        for size in PADDED_SIZES if self._model.compiled else (1,):
            if size < self.batch_limit:
                self._fits(size)

    def _fits(self, size: int) -> bool:
        return self._forward_or_none(np.zeros((size, *self.input_size, 3), np.uint8), size) is not None

    def predict(self, rgb: Pixels, *, live: bool = False) -> Pixels:
        """`rgb`: (H, W, 3) uint8, sRGB, of `input_size`. Blocks; returns the mask, (H, W) uint8, 255 is subject.

        Raises `OutOfMemory` if the device does not hold even this one image, `ContentError` (`mask_not_finite`), and
        `DeviceLost` after which the predictor is dead.
        """
        if rgb.shape != (*self.input_size, 3) or rgb.dtype != np.uint8:
            raise ValueError(f"Expected uint8 of {(*self.input_size, 3)}, got {rgb.dtype} of {rgb.shape}.")
        request = _Request(rgb, live=live)
        with self._changed:
            if self._closing or self.lost.is_set():
                raise DeviceLost("The predictor has ended; this worker process must end too.")
            if not self.waiting:
                self.last_progress = time.monotonic()
            self._lane(request).append(request)
            self._changed.notify_all()
        return self._wait_for(request)

    def close(self) -> None:
        """Answers everything handed in, then ends the thread. Safe to call twice."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(self._stall_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _wait_for(self, request: _Request) -> Pixels:
        """Whoever waits is the watchdog: there is no hang without a waiting caller."""
        while True:
            try:
                return request.answer.result(timeout=min(_LOOK_S, self._stall_s))
            except FutureTimeout:
                silent_s = time.monotonic() - self.last_progress
                if silent_s > self._stall_s and not request.answer.done():
                    self._lose(f"The device has made no progress for {self._stall_s:g} s.")

    def _serve(self) -> None:
        while self._has_work():
            if self._warming is not None:
                self._answer_warm_up(self._warming)
                continue
            try:
                if batch := self._take():
                    self._run(batch)
            except Exception as exc:  # whatever the device raises, callers must hear of it
                self._lose(f"The device failed: {type(exc).__name__}: {exc}", cause=exc)
                return

    def _has_work(self) -> bool:
        """Blocks; false when closed and done, or lost."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._warming or self._live or self._backfill or self._closing or self.lost.is_set()
            )
            return not self.lost.is_set() and bool(self._warming or self._live or self._backfill)

    def _take(self) -> list[_Request]:
        """The next batch: live first, oldest first; empty if all were just told that the device is lost."""
        with self._changed:
            limit = min(self.batch_limit, len(self._live) + len(self._backfill))
            self._running = [(self._live or self._backfill).popleft() for _ in range(limit)]
            return self._running

    def _run(self, batch: list[_Request]) -> None:
        started = time.monotonic()
        self._busy = (self._busy[0], started)
        size = self._padded(len(batch))
        masks = self._forward_or_none(np.stack([request.rgb for request in batch]), size)
        self.last_progress = time.monotonic()
        self._busy = (self._busy[0] + self.last_progress - started, None)
        if masks is None:
            self._step_down(batch, size)
            return
        self.batch_sizes[len(batch)] += 1
        self.images += len(batch)
        with self._changed:
            self._running = []
        for request, mask in zip(batch, masks, strict=False):
            request.finish(mask)

    def _forward_or_none(self, rgb: Pixels, size: int) -> list[Pixels | None] | None:
        """None: out of memory, whose traceback and tensors are gone when this returns."""
        try:
            return self._forward(rgb, size)
        except (MemoryError, RuntimeError) as exc:
            if not _is_out_of_memory(exc):
                raise
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    @torch.inference_mode()
    def _forward(self, rgb: Pixels, size: int) -> list[Pixels | None]:
        """`rgb`: (N, H, W, 3), padded to `size`. A mask is None where the model gave something that is no number."""
        if size > len(rgb):
            rgb = np.concatenate([rgb, np.zeros((size - len(rgb), *rgb.shape[1:]), np.uint8)])
        pixels = torch.from_numpy(rgb).to(self._model.device).permute(0, 3, 1, 2)
        x = (pixels.float() * self._scale - self._shift).to(self._model.dtype)
        alpha = self._model(x)
        finite = alpha.isfinite().flatten(1).all(1).cpu().tolist()
        masks: Pixels = (alpha.float() * 255).round().to(torch.uint8).squeeze(1).cpu().numpy()
        return [mask if sound else None for mask, sound in zip(masks, finite, strict=True)]

    def _padded(self, count: int) -> int:
        return min(size for size in PADDED_SIZES if size >= count) if self._model.compiled else count

    def _step_down(self, batch: list[_Request], size: int) -> None:
        with self._changed:
            self._running = []
            if len(batch) > 1:
                self.batch_limit = (size + 1) // 2  # of three: two may fit
                for request in reversed(batch):
                    self._lane(request).appendleft(request)
                return
        batch[0].fail(self._too_small())

    def _too_small(self) -> OutOfMemory:
        height, width = self.input_size
        dtype = str(self._model.dtype).removeprefix("torch.")
        return OutOfMemory(
            f"The device does not hold one image at {height} x {width} in {dtype} with {self._model.name}. "
            "Use a smaller model, float16, or a larger device."
        )

    def _lose(self, why: str, *, cause: Exception | None = None) -> None:
        """Who was in the batch learns it: one of them may be the reason. `why`: the same for the same fault."""
        with self._changed:
            self.lost.set()
            running, waiting = self._running, [*self._live, *self._backfill]
            self._running = []
            self._live.clear()
            self._backfill.clear()
            self._changed.notify_all()
        for request in (*running, *waiting):
            error = DeviceLost(why, on_device=request in running)
            error.__cause__ = cause
            request.fail(error)

    def _lane(self, request: _Request) -> deque[_Request]:
        return self._live if request.live else self._backfill


class _Request:
    def __init__(self, rgb: Pixels, *, live: bool) -> None:
        self.rgb = rgb
        self.live = live
        self.answer: Future[Pixels] = Future()

    def finish(self, mask: Pixels | None) -> None:
        if mask is None:
            self.fail(
                ContentError(
                    "The model gave no numbers for this image: the precision overflows. Set CUTFLEET_DTYPE=float32.",
                    code="mask_not_finite",
                )
            )
            return
        with contextlib.suppress(InvalidStateError):  # a hung batch that came back: its caller was told already
            self.answer.set_result(mask)

    def fail(self, error: Exception) -> None:
        with contextlib.suppress(InvalidStateError):  # answered a moment ago, by the device itself
            self.answer.set_exception(error)


def _largest_padded(limit: int) -> int:
    return max(size for size in PADDED_SIZES if size <= max(1, limit))


def _normalisation(model: LoadedModel) -> tuple[Tensor, Tensor]:
    """Scale and shift, (1, 3, 1, 1) each on the device, that take uint8 to normalised: x * scale - shift."""
    mean = torch.tensor(model.mean, device=model.device).view(1, 3, 1, 1)
    std = torch.tensor(model.std, device=model.device).view(1, 3, 1, 1)
    return 1 / (255 * std), mean / std


def _is_out_of_memory(exc: BaseException) -> bool:
    """torch's own type, the CPU allocator's text, and what cuBLAS and cuDNN say when their workspace does not fit."""
    if isinstance(exc, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(text in str(exc) for text in ("can't allocate memory", "ALLOC_FAILED", "out of memory"))
