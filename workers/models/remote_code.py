"""A model that brings its own code, run only where the operator said so and pinned what was read. Its class is built
directly on a real device and filled strictly: what `from_pretrained` adds is what breaks such code.
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

from jobs.catalogue import REVISION
from jobs.errors import ModelError

AUTO_CLASS = "AutoModelForImageSegmentation"


def code_revision(directory: Path) -> str:
    """40 hex digits that change with any Python file of `directory`: what a pin on local code means."""
    total = hashlib.sha1(usedforsecurity=False)
    for path in sorted(directory.rglob("*.py")):
        content = path.read_bytes()
        total.update(f"{path.relative_to(directory)} {len(content)}\n".encode() + content)
    return total.hexdigest()


def check_opt_in(name: str, *, trusted: bool, revision: str) -> None:
    """Raises `ModelError` (`remote_code_refused`) unless running the code was allowed and a full revision pinned."""
    if not trusted:
        raise ModelError(
            f"{name} is no architecture of ours and would run its own Python code here. If you have read it and trust "
            "it, set CUTFLEET_TRUST_REMOTE_CODE=1 and pin it with CUTFLEET_MODEL_REVISION.",
            code="remote_code_refused",
        )
    if not REVISION.fullmatch(revision):
        raise ModelError(
            f"CUTFLEET_MODEL_REVISION is {revision!r}; running the code of {name} needs the full 40-digit revision "
            "that you have read, not a branch or a tag.",
            code="remote_code_refused",
        )


def check_pinned_code(directory: Path, revision: str) -> None:
    """For a local directory, which has no revision of its own, the pin is `code_revision`."""
    if (actual := code_revision(directory)) != revision:
        raise ModelError(
            f"The code in {directory} is {actual}, not the pinned {revision or '(none)'}. Read it again, then set "
            f"CUTFLEET_MODEL_REVISION={actual}.",
            code="remote_code_refused",
        )


def build_network(directory: Path, config: Mapping[str, Any]) -> nn.Module:
    """The class that `auto_map` names, constructed on the CPU from its own configuration, not filled yet.

    Raises `ModelError` (`model_mismatch`) if there is none or its code fails.
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
            arguments["bb_pretrained"] = False  # else it would fetch a backbone's weights
        with torch.device("cpu"):
            network = model_class(**arguments)
    except Exception as exc:  # whatever a stranger's code raises
        raise ModelError(f"The code in {directory} fails: {type(exc).__name__}: {exc}", code="model_mismatch") from exc
    if not isinstance(network, nn.Module):
        raise ModelError(f"{names[AUTO_CLASS]} in {directory} is no torch module.", code="model_mismatch")
    return network


def logits_of(output: Any) -> Tensor:
    """The map in what such a model returns: the last of a list, `.logits`, or the tensor itself, before the sigmoid."""
    while isinstance(output, (list, tuple)):
        output = output[-1]
    logits: Tensor = getattr(output, "logits", output)
    return logits


def _make_config(config_class: type, values: Mapping[str, Any]) -> Any:
    """Constructed with what it accepts, given the rest, and completed where it skips its base's constructor."""
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
    """`module.Class` of `directory`, as a package of its own: a folder's name may hold a dot or a dash."""
    package = f"cutfleet_model_{hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:12]}"
    if package not in sys.modules:
        module = types.ModuleType(package)
        module.__path__ = [str(directory)]
        sys.modules[package] = module
    name, _, class_name = reference.rpartition("--")[2].rpartition(".")
    found: type = getattr(importlib.import_module(f"{package}.{name}"), class_name)
    return found
