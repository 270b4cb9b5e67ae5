"""Run a model's own code, only if the operator allows it and pins the revision that was read. The class is constructed
directly on the CPU and its weights are loaded strictly: the extra steps of `from_pretrained` break such code.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jobs.errors import ModelError
from jobs.hub import REVISION

AUTO_CLASS = "AutoModelForImageSegmentation"


def code_revision(directory: Path) -> str:
    """Return 40 hex digits that change with any Python file in `directory`: the revision of local code."""
    total = hashlib.sha1(usedforsecurity=False)
    for path in sorted(directory.rglob("*.py")):
        content = path.read_bytes()
        total.update(f"{path.relative_to(directory)} {len(content)}\n".encode() + content)
    return total.hexdigest()


def check_opt_in(name: str, *, trusted: bool, revision: str) -> None:
    """Raise `ModelError` (`remote_code_refused`) unless running the code is allowed and a full revision is pinned."""
    if not trusted:
        raise ModelError(
            f"{name} has no built-in architecture: its own Python code would run here. If you have read that code and "
            "trust it, set CUTFLEET_TRUST_REMOTE_CODE=1 and pin it with CUTFLEET_MODEL_REVISION.",
            code="remote_code_refused",
        )
    if not REVISION.fullmatch(revision):
        raise ModelError(
            f"CUTFLEET_MODEL_REVISION is {revision!r}; running the code of {name} requires the full 40-digit revision "
            "that you have read, not a branch or a tag.",
            code="remote_code_refused",
        )


def check_pinned_code(directory: Path, revision: str) -> None:
    """Raise `ModelError` (`remote_code_refused`) if the code of a local directory has another `code_revision`."""
    if (actual := code_revision(directory)) != revision:
        raise ModelError(
            f"The code in {directory} has revision {actual}, not the pinned {revision or '(none)'}. Read it, then set "
            f"CUTFLEET_MODEL_REVISION={actual}.",
            code="remote_code_refused",
        )


def build_network(directory: Path, config: Mapping[str, Any]) -> nn.Module:
    """Construct the class that `auto_map` names on the CPU, with its own configuration and without the weights.

    Raises `ModelError` (`model_mismatch`) if there is no such class or its code fails.
    """
    names = config.get("auto_map", {})
    if AUTO_CLASS not in names:
        raise ModelError(f"auto_map in {directory / 'config.json'} names no {AUTO_CLASS}.", code="model_mismatch")
    try:
        model_class = _import_class(directory, names[AUTO_CLASS])
        arguments: dict[str, Any] = {}
        accepted = inspect.signature(model_class).parameters
        if "AutoConfig" in names and "config" in accepted:
            arguments["config"] = _make_config(_import_class(directory, names["AutoConfig"]), config)
        if "bb_pretrained" in accepted:
            arguments["bb_pretrained"] = False  # else it fetches the weights of a backbone
        with torch.device("cpu"):
            network = model_class(**arguments)
    except Exception as exc:  # foreign code raises anything
        raise ModelError(f"The code in {directory} fails: {type(exc).__name__}: {exc}", code="model_mismatch") from exc
    if not isinstance(network, nn.Module):
        raise ModelError(f"{names[AUTO_CLASS]} in {directory} is not a torch module.", code="model_mismatch")
    return network


def find_logits(output: Any) -> Tensor:
    """Return the logits in a model's output: the last entry of a list, `.logits`, or the tensor itself."""
    while isinstance(output, (list, tuple)):
        output = output[-1]
    logits: Tensor = getattr(output, "logits", output)
    return logits


def _make_config(config_class: type, values: Mapping[str, Any]) -> Any:
    """Construct it with the values that it accepts, set the others as attributes, and add the defaults that are missing
    if it skips the constructor of `PretrainedConfig`.
    """
    from transformers import PretrainedConfig

    accepted = inspect.signature(config_class).parameters
    config = config_class(**{name: value for name, value in values.items() if name in accepted})
    for name, value in values.items():
        if name not in accepted and name not in ("auto_map", "architectures", "model_type"):
            setattr(config, name, value)
    if isinstance(config, PretrainedConfig):
        for name, value in vars(PretrainedConfig()).items():
            vars(config).setdefault(name, value)
    return config


def _import_class(directory: Path, reference: str) -> type:
    """Import `module.Class` from `directory`, as a package with a generated name: a folder's may contain a dot."""
    package = f"cutfleet_model_{hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:12]}"
    if package not in sys.modules:
        module = types.ModuleType(package)
        module.__path__ = [str(directory)]
        sys.modules[package] = module
    name, _, class_name = reference.rpartition("--")[2].rpartition(".")
    found: type = getattr(importlib.import_module(f"{package}.{name}"), class_name)
    return found
