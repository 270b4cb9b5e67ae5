"""The predictor with stand-ins for the model only: the thread, the queues and the errors are the real ones."""

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
from workers.models.batcher import Predictor

SIZE = (8, 12)
DEADLINE_S = 20


class Device:
    """A model that gives each image's red channel as alpha, waits at a gate, and notes every batch."""

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
        name="stand-in",
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


def hand_in(
    predictor: Predictor, pool: ThreadPoolExecutor, red: int, *, live: bool = False
) -> Future[NDArray[np.uint8]]:
    """Returns once the predictor has the image."""
    before = predictor.waiting
    future = pool.submit(predictor.predict, image(red), live=live)
    wait_until(lambda: predictor.waiting > before or future.done())
    return future


def wait_until(condition: Callable[[], bool]) -> None:
    tick = threading.Event()
    for _ in range(DEADLINE_S * 1000):
        if condition():
            return
        tick.wait(0.001)
    raise AssertionError("The deadline passed.")


def test_each_caller_gets_the_mask_of_its_own_image(callers: ThreadPoolExecutor) -> None:
    with Predictor(make_model(Device()), batch_limit=8) as predictor:
        futures = {red: callers.submit(predictor.predict, image(red)) for red in range(40)}

        masks = {red: future.result(DEADLINE_S) for red, future in futures.items()}

    assert all(mask.shape == SIZE and mask.dtype == np.uint8 for mask in masks.values())
    assert all((mask == red).all() for red, mask in masks.items())
    assert predictor.images == 40
    assert predictor.waiting == 0


def test_what_waits_while_the_device_works_becomes_one_batch_with_live_first(callers: ThreadPoolExecutor) -> None:
    device = Device(gated=True)
    with Predictor(make_model(device), batch_limit=4) as predictor:
        futures = [hand_in(predictor, callers, 1)]
        assert device.entered.wait(DEADLINE_S)
        futures += [hand_in(predictor, callers, red) for red in (2, 3, 4, 5)]
        futures += [hand_in(predictor, callers, red, live=True) for red in (100, 101)]

        device.gate.set()
        for future in futures:
            future.result(DEADLINE_S)

    assert device.reds == [[1], [100, 101, 2, 3], [4, 5]]
    assert predictor.batch_sizes == {1: 1, 4: 1, 2: 1}


def test_a_batch_that_runs_counts_as_work_before_it_ends(callers: ThreadPoolExecutor) -> None:
    device = Device(gated=True)
    with Predictor(make_model(device), batch_limit=1) as predictor:
        future = hand_in(predictor, callers, 1)
        assert device.entered.wait(DEADLINE_S)

        first, second = predictor.device_s, predictor.device_s
        device.gate.set()
        future.result(DEADLINE_S)

        assert 0 < first < second < predictor.device_s
        assert predictor.device_s == predictor.device_s, "it stands still when there is nothing to do"


def test_out_of_memory_halves_the_batch_and_loses_no_image(callers: ThreadPoolExecutor) -> None:
    device = Device(memory=2, gated=True)
    with Predictor(make_model(device), batch_limit=8) as predictor:
        futures = {red: hand_in(predictor, callers, red) for red in range(40)}

        device.gate.set()
        masks = {red: future.result(DEADLINE_S) for red, future in futures.items()}

    assert all((mask == red).all() for red, mask in masks.items())
    assert predictor.batch_limit == 2
    assert max(device.batches) == 2
    assert not predictor.lost.is_set()


def test_of_three_that_do_not_fit_two_are_tried_before_one(callers: ThreadPoolExecutor) -> None:
    device = Device(memory=2, gated=True)
    with Predictor(make_model(device), batch_limit=3) as predictor:
        futures = [hand_in(predictor, callers, 1)]
        assert device.entered.wait(DEADLINE_S)
        futures += [hand_in(predictor, callers, red) for red in (2, 3, 4)]

        device.gate.set()
        for future in futures:
            future.result(DEADLINE_S)

    assert device.batches == [1, 2, 1]
    assert predictor.batch_limit == 2


def test_an_image_that_does_not_fit_alone_fails_alone(callers: ThreadPoolExecutor) -> None:
    device = Device(memory=0)
    with Predictor(make_model(device), batch_limit=4) as predictor:
        with pytest.raises(OutOfMemory, match=r"one image at 8 x 12 in float32 with stand-in"):
            predictor.predict(image(1))

        device.memory = 1
        mask = predictor.predict(image(2))

    assert (mask == 2).all()
    assert not predictor.lost.is_set()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_every_form_of_out_of_memory_is_known(error: Exception) -> None:
    def full(x: Tensor) -> Tensor:
        raise error

    with Predictor(make_model(full), batch_limit=1) as predictor, pytest.raises(OutOfMemory):
        predictor.predict(image(1))


def test_any_other_device_error_ends_the_predictor_for_every_caller(callers: ThreadPoolExecutor) -> None:
    gate = threading.Event()

    def failing(x: Tensor) -> Tensor:
        assert gate.wait(DEADLINE_S)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with Predictor(make_model(failing), batch_limit=2) as predictor:
        futures = [hand_in(predictor, callers, red) for red in range(5)]
        gate.set()

        for future in futures:
            with pytest.raises(DeviceLost, match="illegal memory access"):
                future.result(DEADLINE_S)
        with pytest.raises(DeviceLost, match="must end"):
            predictor.predict(image(9))

    assert predictor.lost.is_set()
    assert predictor.waiting == 0


def test_a_hung_device_is_lost_and_its_callers_are_told(callers: ThreadPoolExecutor) -> None:
    device = Device(gated=True)
    with Predictor(make_model(device), batch_limit=1, stall_s=0.05) as predictor:
        futures = [callers.submit(predictor.predict, image(red)) for red in range(3)]

        for future in futures:
            with pytest.raises(DeviceLost):
                future.result(DEADLINE_S)
        device.gate.set()

    assert predictor.lost.is_set()


def test_a_mask_that_is_no_number_fails_its_image_and_no_other(callers: ThreadPoolExecutor) -> None:
    device = Device(gated=True)

    def overflowing(x: Tensor) -> Tensor:
        alpha = device(x)
        return torch.where(alpha * 255 > 200, torch.nan, alpha)

    with Predictor(make_model(overflowing), batch_limit=8) as predictor:
        futures = {red: hand_in(predictor, callers, red) for red in (1, 2, 250, 3)}
        device.gate.set()

        with pytest.raises(ContentError, match="CUTFLEET_DTYPE=float32") as caught:
            futures.pop(250).result(DEADLINE_S)
        assert all((future.result(DEADLINE_S) == red).all() for red, future in futures.items())

    assert caught.value.code == "mask_not_finite"


def test_a_compiled_model_sees_padded_batches_only(callers: ThreadPoolExecutor) -> None:
    device = Device(gated=True)
    with Predictor(make_model(device, compiled=True), batch_limit=13) as predictor:
        futures = {1: hand_in(predictor, callers, 1)}
        assert device.entered.wait(DEADLINE_S)
        futures |= {red: hand_in(predictor, callers, red) for red in range(2, 13)}

        device.gate.set()
        masks = {red: future.result(DEADLINE_S) for red, future in futures.items()}

    assert device.batches == [1, 8, 4]
    assert all((mask == red).all() for red, mask in masks.items())
    assert predictor.images == 12


def test_warming_up_finds_the_batch_that_fits() -> None:
    device = Device(memory=5)
    with Predictor(make_model(device, compiled=True), batch_limit=16) as predictor:
        predictor.warm_up()

        assert sorted(device.batches) == [1, 2, 4]
        assert predictor.batch_limit == 4
        assert predictor.images == 0


def test_warming_up_runs_one_image_alone_too() -> None:
    device = Device()
    with Predictor(make_model(device), batch_limit=6) as predictor:
        predictor.warm_up()

    assert sorted(device.batches) == [1, 6]


def test_warming_up_refuses_a_device_that_is_too_small() -> None:
    with Predictor(make_model(Device(memory=0)), batch_limit=4) as predictor, pytest.raises(OutOfMemory):
        predictor.warm_up()


def test_closing_answers_what_was_handed_in(callers: ThreadPoolExecutor) -> None:
    device = Device(gated=True)
    predictor = Predictor(make_model(device), batch_limit=2)
    futures = {red: hand_in(predictor, callers, red) for red in range(5)}

    device.gate.set()
    predictor.close()

    assert all((future.result(DEADLINE_S) == red).all() for red, future in futures.items())
    with pytest.raises(DeviceLost):
        predictor.predict(image(1))


def test_an_image_of_another_size_is_the_callers_mistake() -> None:
    with Predictor(make_model(Device()), batch_limit=2) as predictor:
        with pytest.raises(ValueError, match=r"\(8, 12, 3\)"):
            predictor.predict(np.zeros((12, 8, 3), np.uint8))

        assert (predictor.predict(image(7)) == 7).all()


def test_the_mask_is_rounded_not_cut() -> None:
    with Predictor(make_model(lambda x: torch.full_like(x[:, :1], 0.9999)), batch_limit=1) as predictor:
        assert (predictor.predict(image(0)) == 255).all()
