"""One worker a GPU, and one of each name: held by names in Linux's abstract socket space, which a process gives back by
ending, however it ends. No file, no right, no clock; whoever shares a network namespace shares the names.
"""

from __future__ import annotations

import contextlib
import socket
import struct

import torch

from jobs.errors import ModelError
from jobs.settings import Settings
from workers.models import describe_device, resolve_device

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: Linux's struct ucred


def claim_device(settings: Settings) -> tuple[torch.device, socket.socket | None]:
    """The device of this worker, and what holds its GPU for as long as it stays open (None on a CPU).

    Raises `ModelError`: `no_gpu` where the GPU asked for is not there, `gpu_taken` where another worker has it.
    """
    if settings.gpu is None:
        device = resolve_device(settings.device)
    elif settings.device == "cpu":
        raise ModelError(
            f"CUTFLEET_GPU is {settings.gpu} and CUTFLEET_DEVICE is cpu: unset one of them.", code="no_gpu"
        )
    elif not torch.cuda.is_available():
        raise ModelError(
            f"CUTFLEET_GPU is {settings.gpu}, and torch sees no such GPU. `nvidia-smi -L` lists what is there, counted "
            "from 0; a worker more than there are GPUs needs CUTFLEET_DEVICE=cpu and no CUTFLEET_GPU.",
            code="no_gpu",
        )
    else:
        device = torch.device("cuda")
    return device, _claim_gpu(device) if device.type == "cuda" else None


def claim_name(node: str) -> socket.socket:
    """Raises `ModelError` (`node_taken`): two workers of one name would count as one in the ledger and in Flower."""
    held = _hold(f"node-{node}")
    if isinstance(held, socket.socket):
        return held
    raise ModelError(
        f"A worker called {node} runs here already (process {held}): give each its own CUTFLEET_NODE.",
        code="node_taken",
    )


def _claim_gpu(device: torch.device) -> socket.socket:
    """By the GPU's own id, so that index, order and what is visible don't matter."""
    held = _hold(f"gpu-{torch.cuda.get_device_properties(device).uuid}")
    if isinstance(held, socket.socket):
        return held
    raise ModelError(
        f"The GPU ({describe_device(device)}) belongs to another worker, process {held}: one a GPU, since two would "
        "halve each other's memory and speed. Give each worker a GPU of its own with CUTFLEET_GPU, counted from 0.",
        code="gpu_taken",
    )


def _hold(name: str) -> socket.socket | int:
    """The socket that holds `name`, or the id of the process that has it: 0 while that is just starting or going."""
    address = f"\0cutfleet-{name}"
    held = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        held.bind(address)
    except OSError:
        with held, contextlib.suppress(OSError):
            held.settimeout(1)  # nobody accepts: it would wait for ever behind others that were refused
            held.connect(address)
            credentials = held.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            return int(_CREDENTIALS.unpack(credentials)[0])
        return 0
    held.listen()
    return held
