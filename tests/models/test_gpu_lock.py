"""One worker for each GPU, and one for each node name. CUDA is faked; processes and locks are real."""

from __future__ import annotations

import subprocess
import sys
from contextlib import AbstractContextManager
from types import SimpleNamespace
from uuid import uuid4

import pytest
import torch

from jobs.errors import ModelError
from jobs.settings import Settings
from workers.process.gpu_lock import lock_device, lock_node

HOLD_LOCK = """
import sys
from workers.process.gpu_lock import lock_name
lock = lock_name(sys.argv[1])
print("locked", flush=True)
input()
"""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> str:
    """A machine with one GPU; returns the GPU's id."""
    uuid = f"GPU-of-{uuid4()}"
    properties = SimpleNamespace(name="NVIDIA L4", total_memory=24 * 2**30, uuid=uuid)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return uuid


def lock_in_another_process(name: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def refusal(lock: AbstractContextManager[object]) -> ModelError:
    with pytest.raises(ModelError) as caught, lock:
        pass
    return caught.value


def test_a_second_worker_on_a_gpu_is_refused_until_the_first_process_has_ended(gpu: str) -> None:
    with lock_in_another_process(f"gpu-{gpu}") as first:
        pinned = refusal(lock_device(Settings(gpu=0)))
        unpinned = refusal(lock_device(Settings()))
        first.kill()
    with lock_device(Settings(gpu=0)) as device:
        assert device.type == "cuda"

    assert (pinned.code, unpinned.code) == ("gpu_taken", "gpu_taken")
    for part in ("NVIDIA L4, 24 GiB", f"process {first.pid}", "CUTFLEET_GPU"):
        assert part in str(pinned)


def test_a_second_worker_with_the_same_node_name_is_refused() -> None:
    node = f"{uuid4()}@host"

    with lock_node(node):
        error = refusal(lock_node(node))
    with lock_node(node):
        pass

    assert error.code == "node_taken"
    assert "CUTFLEET_NODE" in str(error)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_not_replaced_by_the_cpu() -> None:
    error = refusal(lock_device(Settings(gpu=5)))

    assert error.code == "no_gpu"
    assert "CUTFLEET_GPU is 5" in str(error)


def test_a_gpu_and_the_cpu_at_once_are_refused() -> None:
    assert refusal(lock_device(Settings(gpu=0, device="cpu"))).code == "no_gpu"
