"""Run ONNX graphs with onnxruntime: models exported to ONNX, and the built-in model on a CPU, where it takes three
quarters of torch's time for the same masks.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jobs.errors import ModelError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
PACKAGED_GRAPHS = {"u2netp": Path(__file__).with_name("u2netp.onnx")}
"""Graphs for one image, without weights, which are named `network.` plus the key of the state dict. Written by
`tests/support/u2netp_graph.py`."""


@dataclasses.dataclass(frozen=True)
class Graph:
    """`forward`: (N, 3, H, W) float tensor to alpha (N, 1, H, W) float32."""

    forward: Callable[[Tensor], Tensor]
    input_size: tuple[int, int]


def open_graph(path: Path, device: torch.device, *, input_size: tuple[int, int] | None) -> Graph:
    """Open an exported model. `input_size`: (height, width) from `config.json`, for a graph with a dynamic size.

    Raises `ModelError`: onnxruntime or its provider is missing (`model_missing`, `no_gpu`), or the graph does not map
    one image to one mask (`model_mismatch`).
    """
    session = _open_session(path, device)
    images = session.get_inputs()[0]
    size = _find_size(images.shape, input_size, path)
    batch = images.shape[0] if isinstance(images.shape[0], int) else None
    dtype: type[np.floating[Any]] = np.float16 if "float16" in images.type else np.float32
    noise = np.random.default_rng(0).standard_normal((batch or 1, 3, *size)).astype(dtype)
    number, is_logits = _find_mask(session, images.name, noise, path)

    def forward(x: Tensor) -> Tensor:
        parts = [x[start : start + batch] for start in range(0, len(x), batch)] if batch else [x]
        masks = [session.run(None, {images.name: part.cpu().numpy().astype(dtype)})[number] for part in parts]
        out = torch.from_numpy(np.concatenate(masks)).float().view(len(x), 1, *size)
        return out.sigmoid() if is_logits else out

    return Graph(forward, size)


def is_installed() -> bool:
    return importlib.util.find_spec("onnxruntime") is not None


def open_packaged(name: str, state: Mapping[str, Tensor], *, cores: int) -> Callable[[Tensor], Tensor]:
    """Return a function from (N, 3, H, W) to alpha (N, 1, H, W) on the CPU. One image uses all `cores`; several run in
    parallel on one core each, so that no core waits for another.
    """
    single, parallel = (_open_with_weights(PACKAGED_GRAPHS[name], state, threads=threads) for threads in (cores, 1))
    pool = ThreadPoolExecutor(cores, "onnx")

    def forward(x: Tensor) -> Tensor:
        parts = [{"input": part[None].numpy()} for part in x.contiguous()]
        session = single if len(parts) == 1 else parallel
        return torch.from_numpy(np.concatenate(list(pool.map(lambda part: session.run(None, part)[0], parts))))

    return forward


def _open_with_weights(path: Path, state: Mapping[str, Tensor], *, threads: int) -> Any:  # onnxruntime has no types
    import onnxruntime

    weights = {
        f"network.{name}": onnxruntime.OrtValue.ortvalue_from_numpy(value.contiguous().numpy())
        for name, value in state.items()
    }
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # these cores also decode images
    options.enable_mem_pattern = False  # saves 450 MB from the second image on, and is not slower
    options.add_external_initializers(list(weights), list(weights.values()))
    return onnxruntime.InferenceSession(str(path), options, providers=[PROVIDERS["cpu"]])


def _open_session(path: Path, device: torch.device) -> Any:  # onnxruntime has no types
    try:
        import onnxruntime
    except ImportError as exc:
        raise ModelError(f"{path} needs onnxruntime: pip install 'cutfleet[onnx]'.", code="model_missing") from exc
    provider = PROVIDERS[device.type]
    if provider not in onnxruntime.get_available_providers():
        raise ModelError(
            f"The installed onnxruntime has no {provider}. Install onnxruntime-gpu, or set CUTFLEET_DEVICE=cpu.",
            code="no_gpu",
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as exc:  # onnxruntime's errors have no common base
        raise ModelError(f"onnxruntime can't open {path}: {exc}", code="model_mismatch") from exc


def _find_size(shape: list[int | str | None], configured: tuple[int, int] | None, path: Path) -> tuple[int, int]:
    if len(shape) != 4:
        raise ModelError(f"{path} takes input of shape {shape}, not images (N, 3, H, W).", code="model_mismatch")
    height, width = shape[2:]
    if isinstance(height, int) and isinstance(width, int):
        return height, width
    if configured is None:
        raise ModelError(
            f'{path} has a dynamic input size. Add "input_size": [height, width] to config.json beside it.',
            code="model_mismatch",
        )
    return configured


def _find_mask(session: Any, name: str, noise: NDArray[np.floating[Any]], path: Path) -> tuple[int, bool]:
    """Return the number of the output with the mask, the first of full size, and whether it holds logits: for noise or
    for black, logits leave [0, 1].
    """
    count, _, height, width = noise.shape
    runs = [session.run(None, {name: x}) for x in (noise, np.zeros_like(noise))]
    for number, out in enumerate(runs[0]):
        if out.shape[-2:] == (height, width) and out.size == count * height * width:
            values = np.concatenate([outputs[number].ravel() for outputs in runs])
            return number, bool(values.min() < 0 or values.max() > 1)
    raise ModelError(f"{path} has no output of its input's size, {height} x {width}.", code="model_mismatch")
