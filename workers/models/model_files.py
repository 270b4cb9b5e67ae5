"""Find the files of a model by preset, path or hub repository, and check its licence."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.catalogue import IMAGENET_MEAN, IMAGENET_STD, PRESETS, Preset, check_licence
from jobs.errors import ModelError
from jobs.hub import fetch, find_cached, pull
from workers.models.checkpoint import WEIGHTS_NAMES, find_weights, read_config
from workers.models.remote_code import check_opt_in

PACKAGED = {"u2netp": Path(__file__).with_name("u2netp.safetensors")}

_FREE_LICENCES = ("", "mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")

Channels = tuple[float, float, float]
"""One number each for red, green and blue."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """`config`: from `config.json`, empty if there is none. `licence`: empty if unknown. `licence_statement`: what the
    operator stated for it. `is_pinned`: from a hub, at the pinned revision.
    """

    name: str
    weights: Path
    licence: str
    licence_statement: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    preset: Preset | None = None
    is_pinned: bool = False

    @property
    def input_size(self) -> tuple[int, int] | None:
        """(height, width) of the preset, or `input_size` of `config.json`: one number or both. None if not given."""
        if self.preset:
            return self.preset.input_size
        match self.config.get("input_size"):
            case None:
                return None
            case int(side) if side > 0:
                return side, side
            case [int(height), int(width)] if height > 0 and width > 0:
                return height, width
            case other:
                raise ModelError(
                    f"input_size in the config.json of {self.name} is {other!r}; it must be [height, width] in pixels.",
                    code="model_mismatch",
                )

    @property
    def mean(self) -> Channels:
        return self._channels("mean", self.preset.mean if self.preset else IMAGENET_MEAN)

    @property
    def std(self) -> Channels:
        return self._channels("std", self.preset.std if self.preset else IMAGENET_STD)

    def _channels(self, key: str, default: Channels) -> Channels:
        values = self.config.get(key, default)
        if not isinstance(values, list | tuple) or len(values) != 3:
            raise ModelError(f"{key} in config.json is {values!r}; it must be three numbers.", code="model_mismatch")
        return float(values[0]), float(values[1]), float(values[2])


def find_files(source: str, *, accept_licence: str, trust_remote_code: bool, revision: str) -> ModelFiles:
    """Find the files of `source`, a preset, path or hub repository; fetch them if they are not on this machine.

    Raises `ModelError`.
    """
    if preset := PRESETS.get(source):
        statement = check_licence(preset, accept_licence)
        return ModelFiles(
            name=source,
            weights=_find_preset_weights(preset, revision),
            licence=preset.licence,
            licence_statement=statement,
            preset=preset,
        )
    path = Path(source)
    is_local = path.exists()
    if not is_local:
        path = _fetch_repository(source, trust_remote_code=trust_remote_code, revision=revision)
    directory = path if path.is_dir() else path.parent
    name = path.stem if path.is_file() else Path(source).resolve().name
    licence = _read_licence(directory)
    return ModelFiles(
        name=name,
        weights=find_weights(path) if path.is_dir() else path,
        config=read_config(directory),
        licence=licence,
        licence_statement=_check_local_licence(name, licence, accept_licence),
        is_pinned=not is_local and directory.name == revision,
    )


def _find_preset_weights(preset: Preset, revision: str) -> Path:
    if preset.name in PACKAGED and not revision:
        return PACKAGED[preset.name]
    return find_weights(find_cached(preset, revision=revision) or pull(preset, revision=revision))


def _fetch_repository(name: str, *, trust_remote_code: bool, revision: str) -> Path:
    if not _REPOSITORY.fullmatch(name):
        raise ModelError(
            f"CUTFLEET_MODEL is {name!r}, which is no file, no directory and no preset ({', '.join(PRESETS)})."
        )
    check_opt_in(name, trusted=trust_remote_code, revision=revision)
    return fetch(name, revision=revision, patterns=("*.json", "*.py", "*.md", *WEIGHTS_NAMES))


def _read_licence(directory: Path) -> str:
    """Return `license_name` or `license` from the header of the model card, in ASCII; empty if there is none."""
    card = directory / "README.md"
    text = card.read_text("utf-8", errors="replace") if card.is_file() else ""
    header = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    if not header:
        return ""
    fields = dict(re.findall(r"^(license_name|license):\s*[\"']?([^\"'\n]+)", header[1], re.MULTILINE))
    licence = str(fields.get("license_name") or fields.get("license") or "").strip()
    return licence.encode("ascii", "replace").decode()


def _check_local_licence(name: str, licence: str, statement: str) -> str:
    """Require the same statement as for rmbg-2.0 if the model card names a licence that is not free."""
    if licence.lower() in _FREE_LICENCES:
        return ""
    return check_licence(dataclasses.replace(PRESETS["rmbg-2.0"], name=name, licence=licence), statement)
