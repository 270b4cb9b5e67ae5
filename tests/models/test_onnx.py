"""Models exported to ONNX, behind the same interface."""

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
from workers.models.batcher import Predictor
from workers.models.onnx import PACKAGED_GRAPHS
from workers.models.u2net import U2Net

SIZE = (16, 24)


def save_graph(path: Path, *, sigmoid: bool, shape: tuple[int | str, ...] = ("batch", 3, *SIZE)) -> None:
    """The mean of the three channels, twice: a small first output, then the map at full size."""
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
def test_a_graph_gives_alpha_whether_or_not_it_ends_in_a_sigmoid(tmp_path: Path, sigmoid: bool) -> None:
    save_graph(tmp_path / "mean.onnx", sigmoid=sigmoid)
    x = torch.randn(3, 3, *SIZE)

    model = load(str(tmp_path / "mean.onnx"))

    assert (model.name, model.input_size) == ("mean", SIZE)
    torch.testing.assert_close(model(x), x.mean(1, keepdim=True).sigmoid(), atol=1e-5, rtol=0)


def test_a_directory_may_hold_a_graph_and_a_graph_may_take_one_image_at_a_time(tmp_path: Path) -> None:
    save_graph(tmp_path / "model.onnx", sigmoid=True, shape=(1, 3, *SIZE))
    x = torch.randn(3, 3, *SIZE)

    model = load(str(tmp_path))

    torch.testing.assert_close(model(x), x.mean(1, keepdim=True).sigmoid(), atol=1e-5, rtol=0)


def test_the_predictor_runs_it_like_any_other(tmp_path: Path) -> None:
    save_graph(tmp_path / "mean.onnx", sigmoid=True)
    rgb = torch.randint(0, 256, (*SIZE, 3), dtype=torch.uint8).numpy()
    model = load(str(tmp_path / "mean.onnx"))

    with Predictor(model, batch_limit=2) as predictor:
        mask = predictor.predict(rgb)

    normalised = (rgb / 255 - model.mean) / model.std
    expected = torch.from_numpy(normalised).mean(-1).sigmoid() * 255
    assert (torch.from_numpy(mask).float() - expected).abs().max() <= 0.51


def test_a_size_left_open_must_be_stated(tmp_path: Path) -> None:
    save_graph(tmp_path / "model.onnx", sigmoid=True, shape=("batch", 3, "height", "width"))

    with pytest.raises(ModelError, match='"input_size"') as caught:
        load(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"input_size": [8, 16]}))

    assert caught.value.code == "model_mismatch"
    assert load(str(tmp_path)).input_size == (8, 16)


def test_what_is_no_graph_and_what_gives_no_map_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    save_graph(tmp_path / "flat.onnx", sigmoid=True, shape=("batch", 7))

    for name in ("broken.onnx", "flat.onnx"):
        with pytest.raises(ModelError) as caught:
            load(str(tmp_path / name))
        assert caught.value.code == "model_mismatch"


@pytest.mark.parametrize("setting", [{"dtype": "float16"}, {"compiled": True}])
def test_what_onnxruntime_would_ignore_is_refused(tmp_path: Path, setting: dict[str, Any]) -> None:
    save_graph(tmp_path / "mean.onnx", sigmoid=True)

    with pytest.raises(ModelError, match="unset CUTFLEET_DTYPE and CUTFLEET_COMPILE"):
        load(str(tmp_path / "mean.onnx"), **setting)


@pytest.mark.parametrize("count", [1, 3])
def test_the_built_in_model_gives_the_masks_of_torch(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    fast = load("u2netp")
    monkeypatch.setattr("workers.models.registry.is_installed", lambda: False)
    plain = load("u2netp")
    x = torch.randn(count, 3, 320, 320)

    with torch.inference_mode():
        apart = (fast(x) - plain(x)).abs().max().item() * 255

    assert apart < 0.1  # grey levels
    assert (fast.revision, plain.at_once) == (plain.revision, 1)
    assert fast.at_once == torch.get_num_threads()


def test_the_graph_of_the_built_in_model_is_the_one_of_its_network() -> None:
    """A change of the network without `python -m tests.support.u2netp_graph` would leave CPU workers with the old one."""
    fresh, shipped = (
        export(U2Net("u2netp")).graph,
        onnx.load(str(PACKAGED_GRAPHS["u2netp"]), load_external_data=False).graph,
    )

    assert [describe(node) for node in shipped.node] == [describe(node) for node in fresh.node]


def describe(node: onnx.NodeProto) -> tuple[str, list[str], list[str]]:
    return node.op_type, list(node.input), list(node.output)
