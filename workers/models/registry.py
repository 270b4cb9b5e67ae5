"""Load a model by preset, path or hub repository as a `LoadedModel`. Nothing falls back: a model that can't be loaded
exactly as configured raises a `ModelError` that names the setting to change.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from jobs.errors import ModelError
from workers.models.birefnet import MULTIPLE, BiRefNet
from workers.models.checkpoint import digest, fill, read_weights
from workers.models.device import place, resolve_device, resolve_dtype
from workers.models.model_files import PACKAGED, Channels, ModelFiles, find_files
from workers.models.onnx import PACKAGED_GRAPHS, is_installed, open_graph, open_packaged
from workers.models.patch_order import decide_patch_order
from workers.models.remote_code import build_network, check_opt_in, check_pinned_code, find_logits
from workers.models.swin import SIZES
from workers.models.u2net import CHANNELS, U2Net, fold_batch_norm

logger = logging.getLogger(__name__)

_BIREFNET_SIZE, _U2NET_SIZE = (1024, 1024), (320, 320)
"""Input sizes that the authors trained at; `input_size` in `config.json` replaces them."""
_UNKNOWN_LICENCE = "not stated"

Forward = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """Callable on (N, 3, H, W) normalised floats of `dtype` on `device`; returns alpha (N, 1, H, W) float in [0, 1].

    `revision`: hash of the weights, and of anything else that changes the output. `input_size`: (height, width).
    `licence_statement`: what the operator stated, if the licence requires it. `compiled`: batches must be padded.
    `at_once`: images that a CPU computes in parallel, one per core; 1: one after another, on all cores.
    """

    name: str
    revision: str
    input_size: tuple[int, int]
    mean: Channels
    std: Channels
    licence: str
    device: torch.device
    dtype: torch.dtype
    forward: Forward
    licence_statement: str = ""
    compiled: bool = False
    at_once: int = 1

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)

    @property
    def terms(self) -> str:
        """The licence and the operator's statement, if there is one; ASCII."""
        return f"{self.licence} ({self.licence_statement})" if self.licence_statement else self.licence

    @property
    def served_name(self) -> str:
        """The name of a model that is no preset: only characters that a queue's name allows, and the weights' hash."""
        return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', self.name)}@{self.revision[:12]}"


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """`network`: without weights. `variant`: what distinguishes two models of equal weights."""

    network: nn.Module
    input_size: tuple[int, int]
    variant: str = ""


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
    """Load a model. `source`: a preset, a directory in the hub's layout, a weights file, or the `OWNER/NAME` of a hub
    repository whose own code is trusted. The other arguments are the settings of the same names. Raises `ModelError`.
    """
    target = resolve_device(device)
    precision = resolve_dtype(dtype, target)
    files = find_files(source, accept_licence=accept_licence, trust_remote_code=trust_remote_code, revision=revision)
    if files.weights.suffix == ".onnx":
        _check_onnx_settings(files.weights, dtype, compiled=compiled)
        return _load_onnx(files, target)
    state = read_weights(files.weights)
    architecture = _recognise(state, files) or _build_remote(files, trusted=trust_remote_code, revision=revision)
    if isinstance(architecture.network, U2Net):
        state = fold_batch_norm(state)
    fill(architecture.network, state, name=str(files.weights))
    forward, at_once = _choose_runtime(files, architecture.network, state, target, precision, compiled=compiled)
    return LoadedModel(
        name=files.name,
        revision=digest(files.weights) + architecture.variant,
        input_size=architecture.input_size,
        mean=files.mean,
        std=files.std,
        licence=files.licence or _UNKNOWN_LICENCE,
        licence_statement=files.licence_statement,
        device=target,
        dtype=precision,
        forward=forward,
        compiled=compiled,
        at_once=at_once,
    )


def _recognise(state: Mapping[str, Tensor], files: ModelFiles) -> _Architecture | None:
    """Build the architecture that the keys of `state` belong to; None if it is not one of ours."""
    if "bb.patch_embed.proj.weight" in state and "decoder.conv_out1.0.weight" in state:
        return _build_birefnet(state["bb.patch_embed.proj.weight"].shape[0], files)
    first = state.get("stage1.rebnconv1.conv_s1.weight")
    if first is None:
        return None
    variant = next((name for name, channels in CHANNELS.items() if channels["stage1"][1] == len(first)), None)
    if variant is None:
        return None
    return _Architecture(_without_weights(lambda: U2Net(variant)), files.input_size or _U2NET_SIZE)


def _build_birefnet(width: int, files: ModelFiles) -> _Architecture:
    """`width`: channels of the backbone's first stage."""
    size = files.input_size or _BIREFNET_SIZE
    if size[0] % MULTIPLE or size[1] % MULTIPLE:
        raise ModelError(f"input_size of {files.name} is {size}; both sides must be multiples of {MULTIPLE}.")
    backbone = next((name for name, swin in SIZES.items() if swin.width == width), None)
    if backbone is None:
        raise ModelError(
            f"{files.weights} has a backbone of {width} channels; the known backbones are {', '.join(SIZES)}.",
            code="model_mismatch",
        )
    preset_order = files.preset.patch_order if files.preset else None
    order = preset_order or decide_patch_order(files.weights.parent, files.config)
    return _Architecture(_without_weights(lambda: BiRefNet(backbone, order)), size, f"-{order}")


def _build_remote(files: ModelFiles, *, trusted: bool, revision: str) -> _Architecture:
    directory = files.weights.parent
    check_opt_in(files.name, trusted=trusted, revision=revision)
    if not files.is_pinned:
        check_pinned_code(directory, revision)
    network = build_network(directory, files.config)
    return _Architecture(network, files.input_size or _BIREFNET_SIZE, f"-{revision}")


def _choose_runtime(
    files: ModelFiles,
    network: nn.Module,
    state: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
    *,
    compiled: bool,
) -> tuple[Forward, int]:
    """Return the function that computes alpha, and how many images it computes in parallel."""
    if _suits_onnxruntime(files, device, dtype, compiled=compiled):
        cores = torch.get_num_threads()
        return open_packaged(files.name, state, cores=cores), cores
    network = place(network, device, dtype)

    def forward(x: Tensor) -> Tensor:
        return torch.sigmoid(find_logits(network(x)))

    return (torch.compile(forward, dynamic=False) if compiled else forward), 1


def _suits_onnxruntime(files: ModelFiles, device: torch.device, dtype: torch.dtype, *, compiled: bool) -> bool:
    """Whether this is the built-in model in float32 on a CPU, which onnxruntime computes faster than torch."""
    is_built_in = files.name in PACKAGED_GRAPHS and files.weights == PACKAGED[files.name]
    if not is_built_in or device.type != "cpu" or dtype != torch.float32 or compiled:
        return False
    if is_installed():
        return True
    logger.warning("onnxruntime is missing: %s takes a third longer on a CPU. Install 'cutfleet[onnx]'.", files.name)
    return False


def _check_onnx_settings(path: Path, dtype: str | None, *, compiled: bool) -> None:
    if dtype not in (None, "auto", "float32") or compiled:
        raise ModelError(
            f"{path} fixes its precision and can't be compiled: unset CUTFLEET_DTYPE and CUTFLEET_COMPILE.",
            code="model_mismatch",
        )


def _load_onnx(files: ModelFiles, device: torch.device) -> LoadedModel:
    graph = open_graph(files.weights, device, input_size=files.input_size)
    external_data = sorted(files.weights.parent.glob(f"{files.weights.name}*data"))
    return LoadedModel(
        name=files.name,
        revision=digest(files.weights, *external_data),
        input_size=graph.input_size,
        mean=files.mean,
        std=files.std,
        licence=files.licence or _UNKNOWN_LICENCE,
        licence_statement=files.licence_statement,
        device=device,
        dtype=torch.float32,
        forward=graph.forward,
    )


def _without_weights(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network without memory or initial values: `fill` supplies every tensor."""
    with torch.device("meta"):
        return build()
