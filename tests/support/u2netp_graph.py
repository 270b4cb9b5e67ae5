"""Write `workers/models/u2netp.onnx`: the graph of the built-in network for onnxruntime. It has no weights; they are
passed from `u2netp.safetensors` when the graph is opened.

    python -m tests.support.u2netp_graph
"""

from __future__ import annotations

import io
import warnings

import onnx
import torch
from torch import Tensor, nn

from workers.models.onnx import PACKAGED_GRAPHS
from workers.models.u2net import U2Net


class _Alpha(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.network(x))


def export(network: nn.Module) -> onnx.ModelProto:
    """Export the graph from (1, 3, 320, 320) to alpha (1, 1, 320, 320), including the weights by their own names."""
    file = io.BytesIO()
    names = {"input_names": ["input"], "output_names": ["alpha"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older exporter warns, and needs no other package
        torch.onnx.export(_Alpha(network.eval()), (torch.zeros(1, 3, 320, 320),), file, dynamo=False, **names)  # type: ignore[arg-type]
    return onnx.load_from_string(file.getvalue())


def without_weights(model: onnx.ModelProto) -> bytes:
    for weights in model.graph.initializer:
        if weights.name.startswith("network."):
            weights.ClearField("raw_data")
            weights.data_location = onnx.TensorProto.EXTERNAL
            weights.external_data.add(key="location", value="given when it is opened")
    data: bytes = model.SerializeToString()
    return data


if __name__ == "__main__":
    PACKAGED_GRAPHS["u2netp"].write_bytes(without_weights(export(U2Net("u2netp"))))
