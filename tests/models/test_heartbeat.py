"""Heartbeat fields of a worker, and its names."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from celery.utils.nodenames import nodesplit

from jobs.settings import Settings, host_name
from workers.models import load
from workers.models.batcher import Batcher
from workers.process.heartbeat import HeartbeatSource, flower_name, node_name

GPU = {"device": "cuda", "hardware": "NVIDIA L4, 22 GiB", "dtype": "float16", "batch_limit": 8}


def test_the_heartbeat_names_model_licence_hardware_and_limits() -> None:
    model = dataclasses.replace(load("u2netp"), licence_statement="non-commercial")
    draining = threading.Event()
    draining.set()
    with Batcher(model, batch_limit=3) as batcher:
        fields = HeartbeatSource(model, batcher, slots=4, draining=draining).fields()

    names = ("model", "licence", "device", "dtype", "batch_limit", "slots", "renders", "rate", "draining")
    assert {name: fields[name] for name in names} == {
        "model": "u2netp",
        "licence": "Apache-2.0 (non-commercial)",
        "device": "cpu",
        "dtype": "float32",
        "batch_limit": 3,
        "slots": 4,
        "renders": 1,
        "rate": 0.0,
        "draining": 1,
    }
    assert fields["hardware"] == f"CPU, {torch.get_num_threads()} threads"


@pytest.mark.parametrize(
    ("settings", "on_gpu", "name"),
    [(Settings(gpu=3), True, "gpu3"), (Settings(), True, "gpu0"), (Settings(node="left"), True, "left")],
)
def test_a_node_is_named_after_its_gpu(settings: Settings, on_gpu: bool, name: str) -> None:
    assert node_name(settings, on_gpu=on_gpu) == f"{name}@{host_name()}"


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({**GPU, "model": "birefnet"}, "gpu3-NVIDIA-L4-22-GiB-birefnet-float16-b8"),
        ({**GPU, "model": "own@0123456789ab"}, "gpu3-NVIDIA-L4-22-GiB-own-0123456789ab-float16-b8"),
        ({**GPU, "device": "cpu", "model": "u2netp"}, "gpu3-u2netp-float16-b8"),
    ],
)
def test_flower_shows_gpu_memory_model_precision_and_batch(fields: dict[str, str | int], name: str) -> None:
    assert nodesplit(flower_name("gpu3@host", fields)) == [name, "host"]
