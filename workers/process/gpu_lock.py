"""Locks that allow one worker for each GPU and one for each node name. A lock is a name in Linux's abstract socket
namespace: it ends with its process, however that ends, and needs no file, no permission and no clock. Processes that
share a network namespace share the names."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from jobs.errors import ModelError
from jobs.settings import Settings
from workers.models import describe_device, resolve_device

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: Linux's struct ucred


class NameTaken(Exception):
    """`pid`: the process that has the name; 0 while that process is starting or ending."""

    def __init__(self, pid: int) -> None:
        super().__init__(f"process {pid}")
        self.pid = pid


@contextmanager
def lock_device(settings: Settings) -> Iterator[torch.device]:
    """Yield the device of this worker; a GPU stays locked within the block.

    Raises `ModelError`: `no_gpu` if the configured GPU does not exist, `gpu_taken` if another worker has it.
    """
    device = _find_device(settings)
    if device.type != "cuda":
        yield device
        return
    # The GPU's own id is the same whatever its index, its order and CUDA_VISIBLE_DEVICES.
    uuid = torch.cuda.get_device_properties(device).uuid
    try:
        lock = lock_name(f"gpu-{uuid}")
    except NameTaken as exc:
        raise ModelError(
            f"Another worker, process {exc.pid}, uses the GPU ({describe_device(device)}). Two workers would halve "
            "each other's memory and speed: give each worker its own CUTFLEET_GPU, counted from 0.",
            code="gpu_taken",
        ) from exc
    with lock:
        yield device


@contextmanager
def lock_node(node: str) -> Iterator[None]:
    """Keep the node's name within the block. Raises `ModelError` (`node_taken`): the ledger and Flower would count two
    workers of one name as one."""
    try:
        lock = lock_name(f"node-{node}")
    except NameTaken as exc:
        raise ModelError(
            f"A worker called {node} runs on this machine already (process {exc.pid}): set a different CUTFLEET_NODE "
            "for each.",
            code="node_taken",
        ) from exc
    with lock:
        yield


def lock_name(name: str) -> socket.socket:
    """Return a socket that keeps `name` locked until it is closed. Raises `NameTaken`."""
    address = f"\0cutfleet-{name}"
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        lock.bind(address)
    except OSError as exc:
        with lock:
            raise NameTaken(_find_owner(lock, address)) from exc
    lock.listen()
    return lock


def _find_owner(connection: socket.socket, address: str) -> int:
    """Return the id of the process that listens on `address`, 0 if it is not known."""
    with contextlib.suppress(OSError):
        connection.settimeout(
            1
        )  # the owner accepts no connection: behind others in its backlog, we would wait for ever
        connection.connect(address)
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return int(_CREDENTIALS.unpack(credentials)[0])
    return 0


def _find_device(settings: Settings) -> torch.device:
    if settings.gpu is None:
        return resolve_device(settings.device)
    if settings.device == "cpu":
        raise ModelError(
            f"CUTFLEET_GPU is {settings.gpu} and CUTFLEET_DEVICE is cpu: unset one of them.", code="no_gpu"
        )
    if not torch.cuda.is_available():
        raise ModelError(
            f"CUTFLEET_GPU is {settings.gpu}, and torch sees no such GPU. `nvidia-smi -L` lists the GPUs, counted from "
            "0. To run a worker without a GPU, set CUTFLEET_DEVICE=cpu and unset CUTFLEET_GPU.",
            code="no_gpu",
        )
    return torch.device("cuda")
