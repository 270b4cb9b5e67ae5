"""Writes `workers/models/u2netp.onnx`: the graph of the built-in network for onnxruntime. The weights stay in their one
file, and are handed over when the graph is opened.

    python -m tests.support.u2netp_graph
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

import workers.models.onnx as ours
from workers.models.u2net import U2Net


class _Alpha(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.network(x))


def export(network: nn.Module) -> onnx.ModelProto:
    """Alpha (1, 1, 320, 320) of an image (1, 3, 320, 320), the network's weights inside, by their own names."""
    file = io.BytesIO()
    names = {"input_names": ["input"], "output_names": ["alpha"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that needs no further package is the older one
        torch.onnx.export(_Alpha(network.eval()), (torch.zeros(1, 3, 320, 320),), file, dynamo=False, **names)  # type: ignore[arg-type]
    return onnx.load_from_string(file.getvalue())


def without_weights(model: onnx.ModelProto) -> bytes:
    for weights in model.graph.initializer:
        if weights.name.startswith("network."):
            weights.ClearField("raw_data")
            weights.data_location = onnx.TensorProto.EXTERNAL
            weights.external_data.add(key="location", value="given when it is opened")
    return model.SerializeToString()


if __name__ == "__main__":
    Path(ours.__file__).with_name("u2netp.onnx").write_bytes(without_weights(export(U2Net("u2netp"))))
