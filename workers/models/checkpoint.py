"""Read weights from a file into a network. Reading never runs code, and every key must match."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from jobs.errors import ModelError

WEIGHTS_NAMES = ("model.safetensors", "pytorch_model.bin", "model.onnx")
"""Names of a weights file in a model's directory; the first that exists is used."""

PICKLED = (".bin", ".pth", ".pt")
WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that training wrappers add to every key."""

NAMED_IN_ERRORS = 8
"""Keys of each kind that a mismatch lists; the counts are complete."""


def find_weights(directory: Path) -> Path:
    """Return the weights file in a directory of the hub's layout. Raises `ModelError` (`model_missing`)."""
    for name in WEIGHTS_NAMES:
        if (directory / name).is_file():
            return directory / name
    others = [path for path in directory.iterdir() if path.suffix in (".safetensors", ".onnx", *PICKLED)]
    if len(others) == 1:
        return others[0]
    found = ", ".join(sorted(path.name for path in others)) or "none"
    raise ModelError(
        f"{directory} has no {' or '.join(WEIGHTS_NAMES)}, and not exactly one other weights file (found: {found}). "
        "Set CUTFLEET_MODEL to the file.",
        code="model_missing",
    )


def read_config(directory: Path) -> dict[str, Any]:
    """Read `config.json` in `directory`; empty if there is none. Raises `ModelError` (`model_mismatch`)."""
    path = directory / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as exc:
        raise ModelError(f"{path} is not JSON: {exc}.", code="model_mismatch") from exc
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object.", code="model_mismatch")
    return config


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the state dict in `path` as float32, without the prefixes of wrappers.

    Raises `ModelError`: `model_missing`, `model_mismatch`, or `unsafe_weights` for a pickle that would run code.
    """
    if not path.is_file():
        raise ModelError(f"There is no weights file {path}.", code="model_missing")
    state = _read_pickle(path) if path.suffix in PICKLED else _read_safetensors(path)
    for prefix in WRAPPERS:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def fill(network: nn.Module, state: Mapping[str, Tensor], *, name: str) -> None:
    """Load `state` into `network`. Raises `ModelError` (`model_mismatch`) if keys or shapes differ, and lists them."""
    expected = network.state_dict()
    missing = sorted(expected.keys() - state.keys())
    extra = sorted(state.keys() - expected.keys())
    shapes = [
        f"{key} is {list(state[key].shape)}, not {list(expected[key].shape)}"
        for key in sorted(expected.keys() & state.keys())
        if state[key].shape != expected[key].shape
    ]
    problems = [
        f"{len(keys)} {kind}: {', '.join(keys[:NAMED_IN_ERRORS])}{' ...' if len(keys) > NAMED_IN_ERRORS else ''}"
        for kind, keys in (("missing", missing), ("extra", extra), ("of another shape", shapes))
        if keys
    ]
    if problems:
        raise ModelError(f"The keys of {name} do not match the model. {'. '.join(problems)}.", code="model_mismatch")
    network.load_state_dict(dict(state), strict=True, assign=True)


def digest(*paths: Path) -> str:
    """Return the SHA-256, in hex, of the files' bytes in the given order."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as exc:
        raise ModelError(f"{path} is not a complete safetensors file: {exc}.", code="model_mismatch") from exc


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as exc:
        reason = str(exc).splitlines()[0]
        raise ModelError(
            f"{path} is refused: it contains more than tensors, and reading it could run code ({reason}). "
            "If you trust it, convert it to safetensors.",
            code="unsafe_weights",
        ) from exc
    except (RuntimeError, EOFError) as exc:
        raise ModelError(f"{path} is not a complete torch file: {exc}.", code="model_mismatch") from exc
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"{path} is not a state dict: tensors by name.", code="model_mismatch")
    return state
