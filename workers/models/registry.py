"""Loads a model by name or path into one shape, `LoadedModel`, whatever it is made of. Nothing falls back: a model that
can't be had exactly as asked is a `ModelError` whose text says what to change.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jobs.catalogue import IMAGENET_MEAN, IMAGENET_STD, PRESETS, Preset, check_licence, fetch, find_cached, pull
from jobs.errors import ModelError
from workers.models.birefnet import MULTIPLE, BiRefNet
from workers.models.checkpoint import WEIGHTS_NAMES, digest, fill, find_weights, read_config, read_weights
from workers.models.device import place, resolve_device, resolve_dtype
from workers.models.onnx import PACKAGED_GRAPHS, is_installed, open_graph, open_packaged
from workers.models.patch_order import decide_patch_order
from workers.models.remote_code import build_network, check_opt_in, check_pinned_code, logits_of
from workers.models.swin import SIZES
from workers.models.u2net import CHANNELS, U2Net, fold_batch_norm

logger = logging.getLogger(__name__)

PACKAGED = {"u2netp": Path(__file__).with_name("u2netp.safetensors")}
DEFAULT_SIZES = {"birefnet": (1024, 1024), "u2net": (320, 320)}
"""What the authors of each family trained at; `input_size` in `config.json` says otherwise."""

UNSTATED = "not stated"
FREE_LICENCES = ("", "mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0")

Three = tuple[float, float, float]
Forward = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """Callable on (N, 3, H, W) normalised floats of `dtype` on `device`; gives alpha (N, 1, H, W) float in [0, 1].

    `revision`: content hash of the weights, then what else changes what they compute. `input_size`: (height, width).
    `licence_statement`: what the operator stated, where the licence asks for it. `compiled`: batches must be padded.
    `at_once`: images that a CPU computes beside each other, a core each; 1: one after another, on all cores.
    """

    name: str
    revision: str
    input_size: tuple[int, int]
    mean: Three
    std: Three
    licence: str
    device: torch.device
    dtype: torch.dtype
    forward: Callable[[Tensor], Tensor]
    licence_statement: str = ""
    compiled: bool = False
    at_once: int = 1

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)

    @property
    def terms(self) -> str:
        """The licence, with what the operator stated where it asks for that; ASCII."""
        return f"{self.licence} ({self.licence_statement})" if self.licence_statement else self.licence

    @property
    def served_name(self) -> str:
        """For a model that is no preset: its name, as far as a queue may be called so, with the hash of its weights."""
        return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', self.name)}@{self.revision[:12]}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Files:
    """What was found for a source: `config` and `licence` are empty where there is none."""

    name: str
    weights: Path
    config: Mapping[str, Any]
    licence: str
    licence_statement: str
    preset: Preset | None = None
    fetched: bool = False


def load(
    source: str,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    accept_licence: str = "",
    compiled: bool = False,
    trust_remote_code: bool = False,
    revision: str = "",
) -> LoadedModel:
    """`source`: a preset, a directory as the hub lays it out, a weights file, or `OWNER/NAME` of a hub repository whose
    own code is to be trusted. The other arguments are the settings of the same names. Raises `ModelError`.
    """
    where = resolve_device(device)
    precision = resolve_dtype(dtype, where)
    files = _find_files(source, accept_licence, trust_remote_code=trust_remote_code, revision=revision)
    if files.weights.suffix == ".onnx":
        _check_onnx_settings(files.weights, dtype, compiled=compiled)
        return _load_onnx(files, where)
    state = read_weights(files.weights)
    family = _recognise(state)
    if family:
        network, size, kind = _build(family, state, files)
        state = fold_batch_norm(state) if family.startswith("u2net") else state
    else:
        network, size, kind = _build_remote(files, trusted=trust_remote_code, revision=revision)
    fill(network, state, name=str(files.weights))
    forward, at_once = _on_cores(files, state, where, precision, compiled=compiled)
    if forward is None:
        forward = _in_torch(place(network, where, precision), compiled=compiled)
    return LoadedModel(
        name=files.name,
        revision=digest(files.weights) + kind,
        input_size=size,
        mean=_three(files.config, "mean", files.preset.mean if files.preset else IMAGENET_MEAN),
        std=_three(files.config, "std", files.preset.std if files.preset else IMAGENET_STD),
        licence=files.licence or UNSTATED,
        licence_statement=files.licence_statement,
        device=where,
        dtype=precision,
        forward=forward,
        compiled=compiled,
        at_once=at_once,
    )


def _in_torch(network: nn.Module, *, compiled: bool) -> Forward:
    def forward(x: Tensor) -> Tensor:
        return torch.sigmoid(logits_of(network(x)))

    return torch.compile(forward, dynamic=False) if compiled else forward


def _on_cores(
    files: _Files, state: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype, *, compiled: bool
) -> tuple[Forward | None, int]:
    """The built-in model in float32 on a CPU, and how many images it takes at once; None: torch computes it."""
    if files.name not in PACKAGED_GRAPHS or files.weights != PACKAGED.get(files.name):
        return None, 1
    if device.type != "cpu" or dtype != torch.float32 or compiled:
        return None, 1
    if not is_installed():
        logger.warning("onnxruntime is not installed: %s takes a third longer on a CPU.", files.name)
        return None, 1
    cores = torch.get_num_threads()
    return open_packaged(files.name, state, cores=cores), cores


def _find_files(source: str, accept_licence: str, *, trust_remote_code: bool, revision: str) -> _Files:
    if preset := PRESETS.get(source):
        statement = check_licence(preset, accept_licence)
        return _Files(
            name=source,
            weights=_preset_weights(preset, revision),
            config={},
            licence=preset.licence,
            licence_statement=statement,
            preset=preset,
        )
    path = Path(source)
    if not path.exists():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
            raise ModelError(
                f"CUTFLEET_MODEL is {source!r}, which is no file, no directory and no preset ({', '.join(PRESETS)})."
            )
        check_opt_in(source, trusted=trust_remote_code, revision=revision)
        path = fetch(source, revision=revision, patterns=("*.json", "*.py", "*.md", *WEIGHTS_NAMES))
    directory = path if path.is_dir() else path.parent
    name = path.stem if path.is_file() else Path(source).resolve().name
    licence = _read_licence(directory)
    return _Files(
        name=name,
        weights=find_weights(path) if path.is_dir() else path,
        config=read_config(directory),
        licence=licence,
        licence_statement=_check_local_licence(name, licence, accept_licence),
        fetched=directory.name == revision and not Path(source).exists(),
    )


def _preset_weights(preset: Preset, revision: str) -> Path:
    if preset.name in PACKAGED and not revision:
        return PACKAGED[preset.name]
    folder = find_cached(preset, revision=revision) or pull(preset, revision=revision)
    return find_weights(folder)


def _read_licence(directory: Path) -> str:
    """`license_name` or `license` of the model card's header, if there is one, in ASCII."""
    card = directory / "README.md"
    text = card.read_text("utf-8", errors="replace") if card.is_file() else ""
    header = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    fields = (
        dict(re.findall(r"^(license_name|license):\s*[\"']?([^\"'\n]+)", header[1], re.MULTILINE)) if header else {}
    )
    licence = str(fields.get("license_name") or fields.get("license") or "").strip()
    return licence.encode("ascii", "replace").decode()


def _check_local_licence(name: str, licence: str, stated: str) -> str:
    """A model brought as files is asked the same as the preset it is a copy of, going by its card's header."""
    if licence.lower() in FREE_LICENCES:
        return ""
    asked = dataclasses.replace(PRESETS["rmbg-2.0"], name=name, licence=licence)
    return check_licence(asked, stated)


def _recognise(state: Mapping[str, Tensor]) -> str:
    """The architecture whose keys these are: `birefnet`, `u2net`, `u2netp`, or empty."""
    if "bb.patch_embed.proj.weight" in state and "decoder.conv_out1.0.weight" in state:
        return "birefnet"
    first = state.get("stage1.rebnconv1.conv_s1.weight")
    if first is None:
        return ""
    return next((name for name, channels in CHANNELS.items() if channels["stage1"][1] == len(first)), "")


def _build(family: str, state: Mapping[str, Tensor], files: _Files) -> tuple[nn.Module, tuple[int, int], str]:
    """The empty network, its input size, and what the revision says besides the weights."""
    size = _input_size(files) or DEFAULT_SIZES["birefnet" if family == "birefnet" else "u2net"]
    if family != "birefnet":
        return _without_weights(lambda: U2Net(family)), size, ""
    if size[0] % MULTIPLE or size[1] % MULTIPLE:
        raise ModelError(f"input_size of {files.name} is {size}; both must be multiples of {MULTIPLE}.")
    width = state["bb.patch_embed.proj.weight"].shape[0]
    backbone = next((name for name, swin in SIZES.items() if swin.width == width), None)
    if backbone is None:
        raise ModelError(
            f"{files.weights} has a backbone {width} channels wide; we know {', '.join(SIZES)}.", code="model_mismatch"
        )
    order = files.preset.patch_order if files.preset else None
    decided = order or decide_patch_order(files.weights.parent, files.config)
    return _without_weights(lambda: BiRefNet(backbone, decided)), size, f"-{decided}"


def _build_remote(files: _Files, *, trusted: bool, revision: str) -> tuple[nn.Module, tuple[int, int], str]:
    directory = files.weights.parent
    check_opt_in(files.name, trusted=trusted, revision=revision)
    if not files.fetched:
        check_pinned_code(directory, revision)
    return build_network(directory, files.config), _input_size(files) or DEFAULT_SIZES["birefnet"], f"-{revision}"


def _check_onnx_settings(path: Path, dtype: str | None, *, compiled: bool) -> None:
    if dtype not in (None, "auto", "float32") or compiled:
        raise ModelError(
            f"{path} has its precision built in and is not compiled: unset CUTFLEET_DTYPE and CUTFLEET_COMPILE.",
            code="model_mismatch",
        )


def _load_onnx(files: _Files, device: torch.device) -> LoadedModel:
    graph = open_graph(files.weights, device, input_size=_input_size(files))
    outside = sorted(files.weights.parent.glob(f"{files.weights.name}*data"))
    return LoadedModel(
        name=files.name,
        revision=digest(files.weights, *outside),
        input_size=graph.input_size,
        mean=_three(files.config, "mean", IMAGENET_MEAN),
        std=_three(files.config, "std", IMAGENET_STD),
        licence=files.licence or UNSTATED,
        licence_statement=files.licence_statement,
        device=device,
        dtype=torch.float32,
        forward=graph.forward,
    )


def _input_size(files: _Files) -> tuple[int, int] | None:
    """(height, width) of the preset, or `input_size` of `config.json`: one number, or both."""
    if files.preset:
        return files.preset.input_size
    match files.config.get("input_size"):
        case None:
            return None
        case int(side) if side > 0:
            return side, side
        case [int(height), int(width)] if height > 0 and width > 0:
            return height, width
        case other:
            raise ModelError(
                f"input_size in the config.json of {files.name} is {other!r}; it must be [height, width] in pixels.",
                code="model_mismatch",
            )


def _three(config: Mapping[str, Any], key: str, default: Three) -> Three:
    values = config.get(key, default)
    if not isinstance(values, list | tuple) or len(values) != 3:
        raise ModelError(f"{key} in config.json is {values!r}; it must be three numbers.", code="model_mismatch")
    return float(values[0]), float(values[1]), float(values[2])


def _without_weights(make: Callable[[], nn.Module]) -> nn.Module:
    """Built without memory or initial values: every tensor comes from the checkpoint, checked key by key."""
    with torch.device("meta"):
        return make()
