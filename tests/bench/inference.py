"""u2netp on one CPU core: CPU time of each way to compute it, and the difference of its masks from float32 in torch.

    python -m tests.bench.inference [--rounds N] [--compile] [--int8] [--json FILE]

A way is chosen only if it is faster and its masks are the same. `--compile`: also `torch.compile`, which needs a C++
compiler and takes minutes. `--int8`: also onnxruntime's static quantisation, calibrated on the measured image.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import torch
from torch import Tensor

from tests.bench.compare.__main__ import export_onnx
from tests.bench.compare.recipe import load_model
from tests.bench.report import Row, fact, row, run_benchmark
from workers.models.device import limit_threads
from workers.models.registry import load

PHOTO = Path(__file__).parents[2] / "producer/demo/samples/astronaut.jpg"
SIDE = 320
PLAIN, CHOSEN = "torch, float32", "onnxruntime, float32 (chosen)"
Way = Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--int8", action="store_true")
    run_benchmark(parser, measure)


@torch.inference_mode()
def measure(options: argparse.Namespace) -> Iterator[Row]:
    limit_threads(1)
    x = load_input()
    ways = dict(_ways(compiled=options.compile))
    if options.int8:
        ways["onnxruntime, int8"] = _int8(x)
    masks = {name: way(x).float() for name, way in ways.items()}  # this also warms up
    costs: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            started = time.process_time()
            way(x)
            costs[name].append((time.process_time() - started) * 1000)
    for name, times in costs.items():
        others = [] if name == PLAIN else costs[PLAIN]
        yield row(f"u2netp: {name}", times, "CPU ms/image", against=PLAIN if others else "", others=others)
    for name, mask in masks.items():
        difference = (mask - masks[PLAIN]).abs() * 255
        yield fact(f"u2netp: {name}: mask difference, mean", difference.mean().item(), "grey levels")
        yield fact(f"u2netp: {name}: mask difference, greatest", difference.max().item(), "grey levels")


def _ways(*, compiled: bool) -> Iterator[tuple[str, Way]]:
    plain = load_model(threads=1)
    yield PLAIN, plain
    yield "torch, float32, input channels last", lambda x: plain(x.contiguous(memory_format=torch.channels_last))
    for dtype in ("bfloat16", "float16"):
        yield f"torch, {dtype}", _half(dtype)
    if compiled:
        yield "torch.compile, float32", load("u2netp", compiled=True)
    yield CHOSEN, load("u2netp")


def _half(dtype: str) -> Way:
    model = load("u2netp", dtype=dtype)
    return lambda x: model(x.to(model.dtype))


def _int8(x: Tensor) -> Way:
    """Quantise weights per channel, and activations by their least and greatest value in the image."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self.remaining = [{"input": view.numpy()} for view in (x, x.flip(3))]

        def get_next(self) -> dict[str, Any] | None:
            return self.remaining.pop() if self.remaining else None

    with tempfile.TemporaryDirectory() as folder:
        exported, prepared, quantised = (Path(folder, name, "u2netp.onnx") for name in ("exported", "prepared", "int8"))
        export_onnx(exported)
        prepared.parent.mkdir()
        quantised.parent.mkdir()
        quant_pre_process(str(exported), str(prepared))
        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(str(prepared), str(quantised), Images(), per_channel=True, **types)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(quantised), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


def load_input() -> Tensor:
    """Return a normalised photograph: errors of lower precision depend on real values."""
    bgr = cv2.imread(str(PHOTO))
    assert bgr is not None
    rgb = cv2.cvtColor(cv2.resize(bgr, (SIDE, SIDE), interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2RGB)
    scaled = torch.from_numpy(rgb).permute(2, 0, 1)[None].float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (scaled - mean) / std


if __name__ == "__main__":
    main()
