"""Models exported to ONNX behave like any other `LoadedModel`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from jobs.errors import ModelError
from tests.support.u2netp_graph import export
from workers.models import load
from workers.models.batcher import Batcher
from workers.models.onnx import PACKAGED_GRAPHS
from workers.models.u2net import U2Net

SIZE = (16, 24)


def save_graph(path: Path, *, sigmoid: bool, shape: tuple[int | str, ...] = ("batch", 3, *SIZE)) -> None:
    """A graph with two outputs: a small one first, then the mean of the three channels at full size."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["small"]),
        helper.make_node("ReduceMean", ["image", "axis"], ["mean"], keepdims=1),
        helper.make_node("Sigmoid" if sigmoid else "Identity", ["mean"], ["map"]),
    ]
    graph = helper.make_graph(
        nodes,
        "mean",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("small", "map")],
        [helper.make_tensor("axis", TensorProto.INT64, [1], [1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, str(path))


@pytest.mark.parametrize("sigmoid", [True, False])
def test_a_graph_with_or_without_a_sigmoid_gives_alpha(tmp_path: Path, sigmoid: bool) -> None:
    save_graph(tmp_path / "mean.onnx", sigmoid=sigmoid)
    x = torch.randn(3, 3, *SIZE)

    model = load(str(tmp_path / "mean.onnx"))

    assert (model.name, model.input_size) == ("mean", SIZE)
    torch.testing.assert_close(model(x), x.mean(1, keepdim=True).sigmoid(), atol=1e-5, rtol=0)


def test_a_graph_with_a_fixed_batch_of_one_takes_larger_batches(tmp_path: Path) -> None:
    save_graph(tmp_path / "model.onnx", sigmoid=True, shape=(1, 3, *SIZE))
    x = torch.randn(3, 3, *SIZE)

    model = load(str(tmp_path))

    torch.testing.assert_close(model(x), x.mean(1, keepdim=True).sigmoid(), atol=1e-5, rtol=0)


def test_the_batcher_runs_a_graph(tmp_path: Path) -> None:
    save_graph(tmp_path / "mean.onnx", sigmoid=True)
    rgb = torch.randint(0, 256, (*SIZE, 3), dtype=torch.uint8).numpy()
    model = load(str(tmp_path / "mean.onnx"))

    with Batcher(model, batch_limit=2) as batcher:
        mask = batcher.predict(rgb)

    normalised = (rgb / 255 - model.mean) / model.std
    expected = torch.from_numpy(normalised).mean(-1).sigmoid() * 255
    assert (torch.from_numpy(mask).float() - expected).abs().max() <= 0.51


def test_a_dynamic_input_size_must_be_configured(tmp_path: Path) -> None:
    save_graph(tmp_path / "model.onnx", sigmoid=True, shape=("batch", 3, "height", "width"))

    with pytest.raises(ModelError, match='"input_size"') as caught:
        load(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"input_size": [8, 16]}))

    assert caught.value.code == "model_mismatch"
    assert load(str(tmp_path)).input_size == (8, 16)


def test_a_file_that_is_no_graph_and_a_graph_without_a_mask_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    save_graph(tmp_path / "flat.onnx", sigmoid=True, shape=("batch", 7))

    for name in ("broken.onnx", "flat.onnx"):
        with pytest.raises(ModelError) as caught:
            load(str(tmp_path / name))
        assert caught.value.code == "model_mismatch"


@pytest.mark.parametrize("setting", [{"dtype": "float16"}, {"compiled": True}])
def test_settings_that_onnxruntime_would_ignore_are_refused(tmp_path: Path, setting: dict[str, Any]) -> None:
    save_graph(tmp_path / "mean.onnx", sigmoid=True)

    with pytest.raises(ModelError, match="unset CUTFLEET_DTYPE and CUTFLEET_COMPILE"):
        load(str(tmp_path / "mean.onnx"), **setting)


@pytest.mark.parametrize("count", [1, 3])
def test_the_built_in_model_gives_the_masks_of_torch(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    by_onnxruntime = load("u2netp")
    monkeypatch.setattr("workers.models.registry.is_installed", lambda: False)
    by_torch = load("u2netp")
    x = torch.randn(count, 3, 320, 320)

    with torch.inference_mode():
        difference = (by_onnxruntime(x) - by_torch(x)).abs().max().item() * 255

    assert difference < 0.1, "grey levels"
    assert by_onnxruntime.revision == by_torch.revision
    assert (by_onnxruntime.at_once, by_torch.at_once) == (torch.get_num_threads(), 1)


def test_the_packaged_graph_is_the_graph_of_the_network() -> None:
    """If this fails after a change of the network, write the graph again: `python -m tests.support.u2netp_graph`."""
    exported = export(U2Net("u2netp")).graph
    packaged = onnx.load(str(PACKAGED_GRAPHS["u2netp"]), load_external_data=False).graph

    assert [describe(node) for node in packaged.node] == [describe(node) for node in exported.node]


def describe(node: onnx.NodeProto) -> tuple[str, list[str], list[str]]:
    return node.op_type, list(node.input), list(node.output)
