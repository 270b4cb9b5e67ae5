"""The batcher with a fake model; the thread, the queues and the errors are real."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from jobs.errors import ContentError, DeviceLost, OutOfMemory
from workers.models import LoadedModel
from workers.models.batcher import Batcher

SIZE = (8, 12)
DEADLINE_S = 20


class Device:
    """A model that returns the red channel as alpha, blocks until `gate` is set, and records every batch."""

    def __init__(self, *, memory: int = 1000, gated: bool = False) -> None:
        self.memory = memory
        self.batches: list[int] = []
        self.reds: list[list[int]] = []
        self.entered = threading.Event()
        self.gate = threading.Event()
        if not gated:
            self.gate.set()

    def __call__(self, x: Tensor) -> Tensor:
        self.entered.set()
        assert self.gate.wait(DEADLINE_S)
        if len(x) > self.memory:
            raise torch.OutOfMemoryError(f"batch of {len(x)}")
        self.batches.append(len(x))
        self.reds.append([round(float(value) * 255) for value in x[:, 0, 0, 0]])
        return x[:, :1]


def make_model(forward: Callable[[Tensor], Tensor], *, compiled: bool = False) -> LoadedModel:
    return LoadedModel(
        name="fake",
        revision="0",
        input_size=SIZE,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        licence="none",
        device=torch.device("cpu"),
        dtype=torch.float32,
        forward=forward,
        compiled=compiled,
    )


def image(red: int) -> NDArray[np.uint8]:
    rgb = np.zeros((*SIZE, 3), np.uint8)
    rgb[..., 0] = red
    return rgb


@pytest.fixture
def callers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(48) as pool:
        yield pool


def submit(batcher: Batcher, pool: ThreadPoolExecutor, red: int, *, live: bool = False) -> Future[NDArray[np.uint8]]:
    """Return once the batcher has the image."""
    before = batcher.waiting
    future = pool.submit(batcher.predict, image(red), live=live)
    wait_until(lambda: batcher.waiting > before or future.done())
    return future


def wait_until(condition: Callable[[], bool]) -> None:
    tick = threading.Event()
    for _ in range(DEADLINE_S * 1000):
        if condition():
            return
        tick.wait(0.001)
    raise AssertionError("The deadline passed.")


def test_each_caller_gets_the_mask_of_its_own_image(callers: ThreadPoolExecutor) -> None:
    with Batcher(make_model(Device()), batch_limit=8) as batcher:
        futures = {red: callers.submit(batcher.predict, image(red)) for red in range(40)}

        masks = {red: future.result(DEADLINE_S) for red, future in futures.items()}

    assert all(mask.shape == SIZE and mask.dtype == np.uint8 for mask in masks.values())
    assert all((mask == red).all() for red, mask in masks.items())
    assert batcher.images == 40
    assert batcher.waiting == 0


def test_images_that_wait_for_the_device_become_one_batch_with_live_first(callers: ThreadPoolExecutor) -> None:
    device = Device(gated=True)
    with Batcher(make_model(device), batch_limit=4) as batcher:
        futures = [submit(batcher, callers, 1)]
        assert device.entered.wait(DEADLINE_S)
        futures += [submit(batcher, callers, red) for red in (2, 3, 4, 5)]
        futures += [submit(batcher, callers, red, live=True) for red in (100, 101)]

        device.gate.set()
        for future in futures:
            future.result(DEADLINE_S)

    assert device.reds == [[1], [100, 101, 2, 3], [4, 5]]
    assert batcher.batch_sizes == {1: 1, 4: 1, 2: 1}


def test_the_current_batch_counts_as_device_time(callers: ThreadPoolExecutor) -> None:
    device = Device(gated=True)
    with Batcher(make_model(device), batch_limit=1) as batcher:
        future = submit(batcher, callers, 1)
        assert device.entered.wait(DEADLINE_S)

        first, second = batcher.device_s, batcher.device_s
        device.gate.set()
        future.result(DEADLINE_S)

        assert 0 < first < second < batcher.device_s
        assert batcher.device_s == batcher.device_s, "constant while the device is idle"


def test_out_of_memory_halves_the_batch_and_loses_no_image(callers: ThreadPoolExecutor) -> None:
    device = Device(memory=2, gated=True)
    with Batcher(make_model(device), batch_limit=8) as batcher:
        futures = {red: submit(batcher, callers, red) for red in range(40)}

        device.gate.set()
        masks = {red: future.result(DEADLINE_S) for red, future in futures.items()}

    assert all((mask == red).all() for red, mask in masks.items())
    assert batcher.batch_limit == 2
    assert max(device.batches) == 2
    assert not batcher.lost.is_set()


def test_a_limit_of_three_falls_to_two_before_one(callers: ThreadPoolExecutor) -> None:
    device = Device(memory=2, gated=True)
    with Batcher(make_model(device), batch_limit=3) as batcher:
        futures = [submit(batcher, callers, 1)]
        assert device.entered.wait(DEADLINE_S)
        futures += [submit(batcher, callers, red) for red in (2, 3, 4)]

        device.gate.set()
        for future in futures:
            future.result(DEADLINE_S)

    assert device.batches == [1, 2, 1]
    assert batcher.batch_limit == 2


def test_an_image_that_does_not_fit_fails_no_other(callers: ThreadPoolExecutor) -> None:
    device = Device(memory=0)
    with Batcher(make_model(device), batch_limit=4) as batcher:
        with pytest.raises(OutOfMemory, match=r"one image at 8 x 12 in float32 with fake"):
            batcher.predict(image(1))

        device.memory = 1
        mask = batcher.predict(image(2))

    assert (mask == 2).all()
    assert not batcher.lost.is_set()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_every_form_of_out_of_memory_is_recognised(error: Exception) -> None:
    def full(x: Tensor) -> Tensor:
        raise error

    with Batcher(make_model(full), batch_limit=1) as batcher, pytest.raises(OutOfMemory):
        batcher.predict(image(1))


def test_any_other_device_error_is_raised_in_every_caller(callers: ThreadPoolExecutor) -> None:
    gate = threading.Event()

    def failing(x: Tensor) -> Tensor:
        assert gate.wait(DEADLINE_S)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with Batcher(make_model(failing), batch_limit=2) as batcher:
        futures = [submit(batcher, callers, red) for red in range(5)]
        gate.set()

        for future in futures:
            with pytest.raises(DeviceLost, match="illegal memory access"):
                future.result(DEADLINE_S)
        with pytest.raises(DeviceLost, match="must exit"):
            batcher.predict(image(9))

    assert batcher.lost.is_set()
    assert batcher.waiting == 0


def test_a_hung_device_is_lost_for_every_caller(callers: ThreadPoolExecutor) -> None:
    device = Device(gated=True)
    with Batcher(make_model(device), batch_limit=1, stall_s=0.05) as batcher:
        futures = [callers.submit(batcher.predict, image(red)) for red in range(3)]

        for future in futures:
            with pytest.raises(DeviceLost):
                future.result(DEADLINE_S)
        device.gate.set()

    assert batcher.lost.is_set()


def test_a_mask_with_nan_fails_only_its_image(callers: ThreadPoolExecutor) -> None:
    device = Device(gated=True)

    def overflowing(x: Tensor) -> Tensor:
        alpha = device(x)
        return torch.where(alpha * 255 > 200, torch.nan, alpha)

    with Batcher(make_model(overflowing), batch_limit=8) as batcher:
        futures = {red: submit(batcher, callers, red) for red in (1, 2, 250, 3)}
        device.gate.set()

        with pytest.raises(ContentError, match="CUTFLEET_DTYPE=float32") as caught:
            futures.pop(250).result(DEADLINE_S)
        assert all((future.result(DEADLINE_S) == red).all() for red, future in futures.items())

    assert caught.value.code == "mask_not_finite"


def test_a_compiled_model_gets_only_padded_batches(callers: ThreadPoolExecutor) -> None:
    device = Device(gated=True)
    with Batcher(make_model(device, compiled=True), batch_limit=13) as batcher:
        futures = {1: submit(batcher, callers, 1)}
        assert device.entered.wait(DEADLINE_S)
        futures |= {red: submit(batcher, callers, red) for red in range(2, 13)}

        device.gate.set()
        masks = {red: future.result(DEADLINE_S) for red, future in futures.items()}

    assert device.batches == [1, 8, 4]
    assert all((mask == red).all() for red, mask in masks.items())
    assert batcher.images == 12


def test_warming_up_finds_the_batch_limit_that_fits() -> None:
    device = Device(memory=5)
    with Batcher(make_model(device, compiled=True), batch_limit=16) as batcher:
        batcher.warm_up()

        assert sorted(device.batches) == [1, 2, 4]
        assert batcher.batch_limit == 4
        assert batcher.images == 0


def test_warming_up_also_runs_a_batch_of_one() -> None:
    device = Device()
    with Batcher(make_model(device), batch_limit=6) as batcher:
        batcher.warm_up()

    assert sorted(device.batches) == [1, 6]


def test_warming_up_raises_if_one_image_does_not_fit() -> None:
    with Batcher(make_model(Device(memory=0)), batch_limit=4) as batcher, pytest.raises(OutOfMemory):
        batcher.warm_up()


def test_closing_computes_all_submitted_images(callers: ThreadPoolExecutor) -> None:
    device = Device(gated=True)
    batcher = Batcher(make_model(device), batch_limit=2)
    futures = {red: submit(batcher, callers, red) for red in range(5)}

    device.gate.set()
    batcher.close()

    assert all((future.result(DEADLINE_S) == red).all() for red, future in futures.items())
    with pytest.raises(DeviceLost):
        batcher.predict(image(1))


def test_an_image_of_another_size_is_a_value_error() -> None:
    with Batcher(make_model(Device()), batch_limit=2) as batcher:
        with pytest.raises(ValueError, match=r"\(8, 12, 3\)"):
            batcher.predict(np.zeros((12, 8, 3), np.uint8))

        assert (batcher.predict(image(7)) == 7).all()


def test_the_mask_is_rounded_not_truncated() -> None:
    with Batcher(make_model(lambda x: torch.full_like(x[:, :1], 0.9999)), batch_limit=1) as batcher:
        assert (batcher.predict(image(0)) == 255).all()
