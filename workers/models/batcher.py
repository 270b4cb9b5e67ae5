"""Compute masks in batches on one device thread. Callers submit images and block; the thread takes all waiting images
as the next batch.

Out of memory halves the batch limit permanently and retries the same images. After any other device error, or no
progress for `STALL_S`, the device is lost: every caller gets `DeviceLost`, and the process must exit.
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
from torch import Tensor

from jobs.errors import ContentError, DeviceLost, OutOfMemory
from workers.imaging.pixels import Pixels
from workers.models import LoadedModel

PADDED_SIZES = (1, 2, 4, 8, 16)
"""Batch sizes of a compiled model. It is compiled for each at the start, and never while it serves."""

STALL_S = 300.0
"""A longer batch has hung: the slowest, one image on a loaded CPU, takes less than a minute."""

_CHECK_S = 1.0
"""Interval at which a waiting caller checks for a stall."""


class Batcher:
    """A `MaskPredictor` that owns `model` until it is closed. `batch_limit`: most images in a batch; reduced when the
    device is out of memory.

    Health and metrics, readable from any thread: `lost` (event), `last_progress` (monotonic seconds), `waiting`,
    `batch_sizes` (batches by size), `images` (computed), `device_s`.
    """

    def __init__(self, model: LoadedModel, *, batch_limit: int, stall_s: float = STALL_S) -> None:
        self.batch_limit = _largest_padded(batch_limit) if model.compiled else batch_limit
        self.lost = threading.Event()
        self.last_progress = time.monotonic()
        self.batch_sizes: Counter[int] = Counter()
        self.images = 0
        self._busy: tuple[float, float | None] = (0.0, None)  # seconds of finished batches, start of the current one
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
        """Images submitted and not computed yet, including those on the device."""
        with self._changed:
            return len(self._live) + len(self._backfill) + len(self._running)

    @property
    def device_s(self) -> float:
        """Seconds in the model, including the current batch: a slow batch must not look like an idle device."""
        total_s, since = self._busy
        return total_s if since is None else total_s + time.monotonic() - since

    def warm_up(self) -> None:
        """Run each batch size once, before the first image: all padded sizes of a compiled model, else the largest,
        halved until it fits, and a batch of one. Sets `batch_limit`. Raises `OutOfMemory` if one image does not fit,
        and what the device raises.
        """
        done: Future[None] = Future()
        with self._changed:
            self._warming = done
            self._changed.notify_all()
        done.result()

    def predict(self, rgb: Pixels, *, live: bool = False) -> Pixels:
        """Block until the mask is computed, (H, W), 255 is subject. `rgb`: (H, W, 3) sRGB of `input_size`. `live`:
        before all backfill images.

        Raises `OutOfMemory` if one image does not fit the device, `ContentError` (`mask_not_finite`), or `DeviceLost`,
        which every later call raises too.
        """
        if rgb.shape != (*self.input_size, 3) or rgb.dtype != np.uint8:
            raise ValueError(f"Expected uint8 of {(*self.input_size, 3)}, got {rgb.dtype} of {rgb.shape}.")
        request = _Request(rgb, live=live)
        with self._changed:
            if self._closing or self.lost.is_set():
                raise DeviceLost("The batcher is closed or its device is lost; this worker process must exit.")
            if not self.waiting:
                self.last_progress = time.monotonic()
            self._queue_of(request).append(request)
            self._changed.notify_all()
        return self._wait_for(request)

    def close(self) -> None:
        """Compute all submitted images, then end the thread. Safe to call twice."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(self._stall_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _wait_for(self, request: _Request) -> Pixels:
        """Detect a stall in the waiting caller: a device can only hang while a caller waits."""
        while True:
            try:
                return request.mask.result(timeout=min(_CHECK_S, self._stall_s))
            except FutureTimeout:
                stalled_s = time.monotonic() - self.last_progress
                if stalled_s > self._stall_s and not request.mask.done():
                    self._lose(f"The device has made no progress for {self._stall_s:g} s.")

    def _serve(self) -> None:
        while self._has_work():
            if self._warming is not None:
                self._warm_up_here(self._warming)
                continue
            try:
                if batch := self._take_batch():
                    self._run(batch)
            except Exception as exc:  # the device raises any type; every caller gets `DeviceLost`
                self._lose(f"The device failed: {type(exc).__name__}: {exc}", cause=exc)
                return

    def _has_work(self) -> bool:
        """Block until there is work. False if the device is lost, or if all is computed after `close`."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._warming or self._live or self._backfill or self._closing or self.lost.is_set()
            )
            return not self.lost.is_set() and bool(self._warming or self._live or self._backfill)

    def _warm_up_here(self, done: Future[None]) -> None:
        """Runs on the device thread: CUDA has separate handles, workspaces and chosen kernels for each thread."""
        self._warming = None
        try:
            self._find_batch_that_fits()
        except Exception as exc:  # raised in the caller of `warm_up`
            done.set_exception(exc)
        else:
            done.set_result(None)

    def _find_batch_that_fits(self) -> None:
        while not self._fits(self.batch_limit):
            if self.batch_limit == 1:
                raise self._out_of_memory()
            self.batch_limit //= 2
        for size in PADDED_SIZES if self._model.compiled else (1,):
            if size < self.batch_limit:
                self._fits(size)

    def _fits(self, size: int) -> bool:
        return self._forward_or_none(np.zeros((size, *self.input_size, 3), np.uint8), size) is not None

    def _take_batch(self) -> list[_Request]:
        """Take the next batch: live first, oldest first. Empty if the device was lost just now."""
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
            self._reduce_limit(batch, size)
            return
        self.batch_sizes[len(batch)] += 1
        self.images += len(batch)
        with self._changed:
            self._running = []
        for request, mask in zip(batch, masks, strict=False):
            request.finish(mask)

    def _forward_or_none(self, rgb: Pixels, size: int) -> list[Pixels | None] | None:
        """Return None if out of memory; by then the traceback and its tensors are freed."""
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
        """Pad `rgb` (N, H, W, 3) to `size` and compute. A mask is None if the model's output has NaN or infinity."""
        if size > len(rgb):
            rgb = np.concatenate([rgb, np.zeros((size - len(rgb), *rgb.shape[1:]), np.uint8)])
        pixels = torch.from_numpy(rgb).to(self._model.device).permute(0, 3, 1, 2)
        x = (pixels.float() * self._scale - self._shift).to(self._model.dtype)
        alpha = self._model(x)
        finite = alpha.isfinite().flatten(1).all(1).cpu().tolist()
        masks: Pixels = (alpha.float() * 255).round().to(torch.uint8).squeeze(1).cpu().numpy()
        return [mask if is_finite else None for mask, is_finite in zip(masks, finite, strict=True)]

    def _padded(self, count: int) -> int:
        return min(size for size in PADDED_SIZES if size >= count) if self._model.compiled else count

    def _reduce_limit(self, batch: list[_Request], size: int) -> None:
        """Queue the batch again under half of the limit; fail a batch of one."""
        with self._changed:
            self._running = []
            if len(batch) > 1:
                self.batch_limit = (size + 1) // 2  # rounded up: of three images, two may fit
                for request in reversed(batch):
                    self._queue_of(request).appendleft(request)
                return
        batch[0].fail(self._out_of_memory())

    def _out_of_memory(self) -> OutOfMemory:
        height, width = self.input_size
        dtype = str(self._model.dtype).removeprefix("torch.")
        return OutOfMemory(
            f"The device's memory does not hold one image at {height} x {width} in {dtype} with {self._model.name}. "
            "Set CUTFLEET_MODEL to a smaller model or CUTFLEET_DTYPE=float16, or use a larger device."
        )

    def _lose(self, why: str, *, cause: Exception | None = None) -> None:
        """Fail all images. `why`: equal for equal faults. Images of the running batch get `on_device`: one of them may
        be the cause.
        """
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

    def _queue_of(self, request: _Request) -> deque[_Request]:
        return self._live if request.live else self._backfill


class _Request:
    def __init__(self, rgb: Pixels, *, live: bool) -> None:
        self.rgb = rgb
        self.live = live
        self.mask: Future[Pixels] = Future()

    def finish(self, mask: Pixels | None) -> None:
        if mask is None:
            self.fail(
                ContentError(
                    "The model's output for this image has NaN or infinity: the precision overflows. "
                    "Set CUTFLEET_DTYPE=float32.",
                    code="mask_not_finite",
                )
            )
            return
        with contextlib.suppress(InvalidStateError):  # the batch hung and came back: its caller has `DeviceLost`
            self.mask.set_result(mask)

    def fail(self, error: Exception) -> None:
        with contextlib.suppress(InvalidStateError):  # the device computed it a moment ago
            self.mask.set_exception(error)


def _largest_padded(limit: int) -> int:
    return max(size for size in PADDED_SIZES if size <= max(1, limit))


def _normalisation(model: LoadedModel) -> tuple[Tensor, Tensor]:
    """Return scale and shift, (1, 3, 1, 1) each, on the device: x * scale - shift normalises uint8."""
    mean = torch.tensor(model.mean, device=model.device).view(1, 3, 1, 1)
    std = torch.tensor(model.std, device=model.device).view(1, 3, 1, 1)
    return 1 / (255 * std), mean / std


def _is_out_of_memory(exc: BaseException) -> bool:
    """Recognise torch's type, and the texts of the CPU allocator, cuBLAS and cuDNN."""
    if isinstance(exc, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(text in str(exc) for text in ("can't allocate memory", "ALLOC_FAILED", "out of memory"))
