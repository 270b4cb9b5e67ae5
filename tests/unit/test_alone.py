"""One worker a GPU, one of each name. What CUDA says is a stand-in here; processes and locks are real."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
import torch

from jobs.errors import ModelError
from jobs.settings import Settings
from workers.process.gpu_lock import claim_device, claim_name

HOLD = "import sys; from workers.process.gpu_lock import _hold; held = _hold(sys.argv[1]); print(held, flush=True); input()"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> str:
    """A machine with one GPU, and the GPU's own id."""
    uuid = f"GPU-of-{uuid4()}"
    properties = SimpleNamespace(name="NVIDIA L4", total_memory=24 * 2**30, uuid=uuid)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return uuid


def hold_elsewhere(name: str) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert "socket" in child.stdout.readline()
    return child


def refusal(call: Any, *arguments: object) -> ModelError:
    with pytest.raises(ModelError) as caught:
        call(*arguments)
    return caught.value


def test_a_second_worker_on_a_gpu_is_refused_until_the_first_is_gone_however_it_went(gpu: str) -> None:
    first = hold_elsewhere(f"gpu-{gpu}")

    with first:
        error = refusal(claim_device, Settings(gpu=0))
        unpinned = refusal(claim_device, Settings())
        first.kill()
    device, held = claim_device(Settings(gpu=0))

    assert (error.code, unpinned.code) == ("gpu_taken", "gpu_taken")
    for part in ("NVIDIA L4, 24 GiB", f"process {first.pid}", "CUTFLEET_GPU"):
        assert part in str(error)
    assert device.type == "cuda"
    assert held is not None
    held.close()


def test_a_second_worker_of_one_name_is_refused() -> None:
    node = f"{uuid4()}@host"
    with claim_name(node):
        error = refusal(claim_name, node)

    claim_name(node).close()
    assert error.code == "node_taken"
    assert "CUTFLEET_NODE" in str(error)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_never_a_cpu() -> None:
    error = refusal(claim_device, Settings(gpu=5))

    assert error.code == "no_gpu"
    assert "CUTFLEET_GPU is 5" in str(error)


def test_a_gpu_and_a_cpu_at_once_are_refused() -> None:
    assert refusal(claim_device, Settings(gpu=0, device="cpu")).code == "no_gpu"
