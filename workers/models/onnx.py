"""A model exported to ONNX, run by onnxruntime: for what was not written in torch, and for the built-in model on a CPU,
where it takes three quarters of the time that torch does and gives the same masks.
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
"""Of one image each, without weights (`tests/support/u2netp_graph.py` writes them), whose names are `network.` and the state's."""


@dataclasses.dataclass(frozen=True)
class Graph:
    """`forward`: (N, 3, H, W) float tensor to alpha (N, 1, H, W) float32. `batch`: the one size it takes, None: any."""

    forward: Callable[[Tensor], Tensor]
    input_size: tuple[int, int]
    batch: int | None


def open_graph(path: Path, device: torch.device, *, input_size: tuple[int, int] | None) -> Graph:
    """`input_size`: (height, width), needed where the graph leaves it open; `config.json` may state it.

    Raises `ModelError`: onnxruntime or its provider is missing (`model_missing`, `no_gpu`), or the graph is not one
    image in, one map out (`model_mismatch`).
    """
    session = _open_session(path, device)
    taken = session.get_inputs()[0]
    size = _size(taken.shape, input_size, path)
    batch = taken.shape[0] if isinstance(taken.shape[0], int) else None
    dtype: type[np.floating[Any]] = np.float16 if "float16" in taken.type else np.float32
    noise = np.random.default_rng(0).standard_normal((batch or 1, 3, *size)).astype(dtype)
    number, is_logits = _find_map(session, taken.name, noise, path)

    def forward(x: Tensor) -> Tensor:
        parts = [x[start : start + batch] for start in range(0, len(x), batch)] if batch else [x]
        maps = [session.run(None, {taken.name: part.cpu().numpy().astype(dtype)})[number] for part in parts]
        out = torch.from_numpy(np.concatenate(maps)).float().view(len(x), 1, *size)
        return out.sigmoid() if is_logits else out

    return Graph(forward, size, batch)


def is_installed() -> bool:
    return importlib.util.find_spec("onnxruntime") is not None


def open_packaged(name: str, state: Mapping[str, Tensor], *, cores: int) -> Callable[[Tensor], Tensor]:
    """Alpha (N, 1, H, W) of (N, 3, H, W) on the CPU. An image alone has all `cores`; several run beside each other, a
    core each, which no core then waits for another in.
    """
    alone, beside = (_open_with_weights(PACKAGED_GRAPHS[name], state, threads=threads) for threads in (cores, 1))
    pool = ThreadPoolExecutor(cores, "onnx")

    def forward(x: Tensor) -> Tensor:
        parts = [{"input": part[None].numpy()} for part in x.contiguous()]
        session = alone if len(parts) == 1 else beside
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
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # images decode on these cores meanwhile
    options.enable_mem_pattern = False  # 450 MB less from the second image on, and no slower
    options.add_external_initializers(list(weights), list(weights.values()))
    return onnxruntime.InferenceSession(str(path), options, providers=[PROVIDERS["cpu"]])


def _open_session(path: Path, device: torch.device) -> Any:  # as above
    try:
        import onnxruntime
    except ImportError as exc:
        raise ModelError(f"{path} needs onnxruntime: pip install 'cutfleet[onnx]'.", code="model_missing") from exc
    provider = PROVIDERS[device.type]
    if provider not in onnxruntime.get_available_providers():
        raise ModelError(
            f"This onnxruntime has no {provider}. Install onnxruntime-gpu, or set CUTFLEET_DEVICE=cpu.", code="no_gpu"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as exc:  # onnxruntime's errors share no base of their own
        raise ModelError(f"onnxruntime can't open {path}: {exc}", code="model_mismatch") from exc


def _size(shape: list[int | str | None], stated: tuple[int, int] | None, path: Path) -> tuple[int, int]:
    if len(shape) != 4:
        raise ModelError(f"{path} takes {shape}, not images (N, 3, H, W).", code="model_mismatch")
    height, width = shape[2:]
    if isinstance(height, int) and isinstance(width, int):
        return height, width
    if stated is None:
        raise ModelError(
            f'{path} leaves its input size open. Add "input_size": [height, width] to config.json beside it.',
            code="model_mismatch",
        )
    return stated


def _find_map(session: Any, name: str, noise: NDArray[np.floating[Any]], path: Path) -> tuple[int, bool]:
    """Which output is the map (the first of full size), and whether it lacks the sigmoid: a map that ever leaves [0, 1]
    is logits. Noise and black are tried, where no logits stay within.
    """
    count, _, height, width = noise.shape
    tried = [session.run(None, {name: x}) for x in (noise, np.zeros_like(noise))]
    for number, out in enumerate(tried[0]):
        if out.shape[-2:] == (height, width) and out.size == count * height * width:
            values = np.concatenate([outputs[number].ravel() for outputs in tried])
            return number, bool(values.min() < 0 or values.max() > 1)
    raise ModelError(f"{path} gives no map of its input's size, {height} x {width}.", code="model_mismatch")
