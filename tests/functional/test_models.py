"""Models in real workers: each image is computed by the model of its recipe; a worker serves a checkpoint directory."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from jobs.ledger import Ledger
from jobs.recipe import Recipe
from jobs.s3.client import Store
from producer.demo.local_stack import LocalStack, inherited_environment
from tests.support.environment import Run
from tests.support.images import decode_image, put_images
from tests.support.places import Places, fetch_output
from tests.support.waiting import wait_until
from workers.imaging.decode import Limits
from workers.imaging.pipeline import cut_out
from workers.models import LoadedModel, load
from workers.models.batcher import Batcher
from workers.models.birefnet import BiRefNet
from workers.process.exit_codes import ExitCode

STATED = "lite-by-rule:non-commercial"
SMALL_DEVICE = Path(__file__).with_name("small_device_worker.py")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    """BiRefNet-lite in the hub's layout, at 256 x 256. Weights follow a rule of the test data, or are torch's own."""
    folder = tmp_path_factory.mktemp("models") / "lite-by-rule"
    folder.mkdir()
    torch.manual_seed(5)
    network = BiRefNet("swin_v1_t", "channels_first")
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    rule = shared_data / "parity" / "weights_by_rule.py"
    if rule.exists():
        state = {name: weights_by_rule(rule, name, value) for name, value in state.items()}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"patch_order": "channels_first", "input_size": 256}))
    (folder / "birefnet.py").write_text("raise SystemExit('never run')\n")
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    return folder


def weights_by_rule(path: Path, name: str, value: torch.Tensor) -> torch.Tensor:
    weights = import_rule(path).tensor_by_rule(name, tuple(value.shape))
    return value if weights is None else torch.from_numpy(np.asarray(weights))


@functools.cache
def import_rule(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("weights_by_rule", path)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_metadata(store: Store, places: Places, name: str) -> dict[str, str]:
    found = store.head(places.cutout(name), role="output")
    assert found is not None
    return dict(found.metadata)


def test_a_checkpoint_directory_computes_the_references_alpha(checkpoint: Path, shared_data: Path) -> None:
    reference = shared_data / "parity" / "birefnet-lite.npz"
    if not reference.exists():
        pytest.skip(f"no reference outputs in {reference}")
    rule = import_rule(shared_data / "parity" / "weights_by_rule.py")

    with torch.inference_mode():
        alpha = load(str(checkpoint), accept_licence=STATED)(torch.from_numpy(rule.input_by_rule(256, 256)))

    with np.load(reference) as expected:
        logits = torch.from_numpy(expected["256x256"]).squeeze()
    torch.testing.assert_close(alpha[0, 0, ::4, ::4], logits.sigmoid(), atol=1e-3, rtol=0)


def test_each_image_is_computed_by_the_model_of_its_recipe(
    fleet: LocalStack, cutfleet: Run, store: Store, ledger: Ledger, places: Places, checkpoint: Path
) -> None:
    model = load(str(checkpoint), accept_licence=STATED)
    names = put_images(store, places, 4)
    other = Places(places.source, places.to + "lite/")
    early = cutfleet("submit", places.source, "--to", other.to, "--model", model.served_name)
    worker = fleet.start_worker(device="cpu", model=str(checkpoint), slots="2", accept_licence=STATED)

    mine = cutfleet("submit", places.source, "--to", places.to)
    exit_codes = [cutfleet("wait", ran.stdout.strip(), "--timeout", "90").returncode for ran in (mine, early)]
    worker.stop()

    assert "No running worker serves" in early.stderr
    assert exit_codes == [0, 0], (mine.stderr, early.stderr)
    assert {read_metadata(store, places, name)["cf-model"] for name in names} == {"u2netp"}
    for name in names:
        metadata = read_metadata(store, other, name)
        assert (metadata["cf-model"], metadata["cf-licence"]) == (model.served_name, "cc-by-nc-4.0 (non-commercial)")
        mask = np.asarray(decode_image(fetch_output(store, other.mask(name))))
        assert np.array_equal(mask, compute_mask(model, fetch_output(store, places.key(name))))
    start_line = next(
        line for line in worker.log.read_text().splitlines() if "ready" in line and model.served_name in line
    )
    for field in ("cc-by-nc-4.0 (non-commercial)", "CPU, ", "float32", "batch_limit"):
        assert field in start_line


def compute_mask(model: LoadedModel, image: bytes) -> np.ndarray:
    with Batcher(model, batch_limit=1) as batcher:
        outputs = cut_out(image, Recipe(model=model.served_name), batcher, limits=Limits())
    return np.asarray(decode_image(outputs.mask))


def test_workers_are_listed_with_hardware_model_and_limits(fleet: LocalStack, cutfleet: Run) -> None:
    table = cutfleet("workers").stdout.splitlines()
    workers = [json.loads(line) for line in cutfleet("workers", "--json").stdout.splitlines()]

    served = next(worker for worker in workers if worker["model"] == "u2netp")
    row = next(line for line in table if line.startswith(served["node"]))
    for field in (served["hardware"], "float32", "u2netp", served["revision"][:12], "serving"):
        assert field in row
    assert table[0].split("  ")[0] == "worker"
    assert served["draining"] is False
    cores = len(os.sched_getaffinity(0))
    assert (served["batch_limit"], served["rate"] >= 0, served["in_flight"] <= served["slots"]) == (cores, True, True)


def test_a_second_worker_with_the_same_node_name_exits_with_the_reason(fleet: LocalStack, cutfleet: Run) -> None:
    workers = [json.loads(line) for line in cutfleet("workers", "--json").stdout.splitlines()]
    first = next(worker["node"] for worker in workers if worker["model"] == "u2netp")
    settings = {"CUTFLEET_DEVICE": "cpu", "CUTFLEET_NODE": first.partition("@")[0]}

    ran = subprocess.run(
        [sys.executable, "-m", "workers"],
        env=inherited_environment() | fleet.environment | settings,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert ran.returncode == ExitCode.SETTINGS
    assert "[node_taken]" in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_a_job_whose_model_no_worker_serves_waits_and_its_status_shows_why(
    fleet: LocalStack, cutfleet: Run, store: Store, places: Places
) -> None:
    put_images(store, places, 1)

    ran = cutfleet("submit", places.source, "--to", places.to, "--model", "birefnet-hr")

    assert ran.returncode == 0
    assert "No running worker serves model 'birefnet-hr'" in ran.stderr
    shown = cutfleet("status", ran.stdout.strip())
    assert "1 open" in shown.stdout
    assert "no running worker serves it" in shown.stdout


def test_a_worker_reduces_its_batches_until_they_fit_the_device_and_loses_no_image(
    stack: LocalStack, fleet: LocalStack, cutfleet: Run, store: Store, ledger: Ledger, places: Places
) -> None:
    put_images(store, places, 40)
    worker = fleet.start_worker(
        program=[str(SMALL_DEVICE)], device="cpu", model="small-device", batch_limit="8", slots="8", node="small"
    )

    def heartbeat() -> dict[str, str]:
        return next(beat for beat in ledger.fleet.workers().values() if beat["pid"] == str(worker.pid))

    ran = cutfleet("submit", places.source, "--to", places.to, "--model", heartbeat()["model"], "--wait")

    assert ran.returncode == 0, ran.stderr
    assert json.loads(cutfleet("status", ran.stdout.strip(), "--json").stdout)["done"] == 40
    wait_until(lambda: heartbeat()["batch_limit"] == "2", what="the batch limit is two")
    worker.stop()
