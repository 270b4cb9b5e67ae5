"""What a worker says of itself, and what it is called."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from celery.utils.nodenames import nodesplit

from jobs.settings import Settings, host_name
from workers.models import load
from workers.models.batcher import Predictor
from workers.process.heartbeat import Rate, flower_name, node_name, worker_facts

GPU = {"device": "cuda", "hardware": "NVIDIA L4, 22 GiB", "dtype": "float16", "batch_limit": 8}


def test_it_says_what_it_runs_on_what_and_under_which_licence() -> None:
    model = dataclasses.replace(load("u2netp"), licence_statement="non-commercial")
    with Predictor(model, batch_limit=3) as predictor:
        facts = worker_facts(model, predictor, Rate(), slots=4, draining=True)

    said = {name: facts[name] for name in ("model", "licence", "device", "dtype", "batch_limit", "slots", "draining")}
    assert said == {
        "model": "u2netp",
        "licence": "Apache-2.0 (non-commercial)",
        "device": "cpu",
        "dtype": "float32",
        "batch_limit": 3,
        "slots": 4,
        "draining": 1,
    }
    assert facts["hardware"] == f"CPU, {torch.get_num_threads()} threads"


def test_the_rate_is_that_of_the_last_minute() -> None:
    rate = Rate()

    said = [rate.of(count, now=now) for now, count in ((0, 0), (5, 10), (60, 120), (120, 120), (125, 120))]

    assert said == [0.0, 2.0, 2.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "on_gpu", "name"), [({"gpu": 3}, True, "gpu3"), ({}, True, "gpu0"), ({"node": "left"}, True, "left")]
)
def test_a_node_is_named_after_its_gpu(settings: dict[str, str], on_gpu: bool, name: str) -> None:
    assert node_name(Settings(**settings), on_gpu=on_gpu) == f"{name}@{host_name()}"  # type: ignore[arg-type]  # text


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        ({**GPU, "model": "birefnet"}, "gpu3-NVIDIA-L4-22-GiB-birefnet-float16-b8"),
        ({**GPU, "model": "own@0123456789ab"}, "gpu3-NVIDIA-L4-22-GiB-own-0123456789ab-float16-b8"),
        ({**GPU, "device": "cpu", "model": "u2netp"}, "gpu3-u2netp-float16-b8"),
    ],
)
def test_flower_shows_gpu_memory_model_precision_and_batch(facts: dict[str, str | int], name: str) -> None:
    assert nodesplit(flower_name("gpu3@host", facts)) == [name, "host"]
