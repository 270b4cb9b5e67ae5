"""Catalogue of models by name: repository, licence, architecture and input size. Importable without torch, so that a
producer can check a name.

An empty `revision` means that none is pinned here: the first pull pins the one it gets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from jobs.errors import ModelError

PatchOrder = Literal["columns_first", "channels_first"]
"""How BiRefNet's decoder cuts its input: `(wg hg c)`, patch by patch (RMBG-2.0 and code before 2024-11-05), or
`(c hg wg)` (code since). Checkpoints of both have the same keys and shapes; only the masks differ."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """`repository`: on the model hub; empty: shipped in this package, or a file that the operator provides.
    `input_size`: (height, width). `parameters_m`: millions of weights. `statements`: the licence requires the operator
    to state one of them.
    """

    name: str
    architecture: Literal["u2netp", "u2net", "birefnet"]
    repository: str
    licence: str
    input_size: tuple[int, int]
    parameters_m: float
    revision: str = ""
    backbone: Literal["", "swin_v1_l", "swin_v1_t"] = ""
    patch_order: PatchOrder | None = None
    statements: tuple[str, ...] = ()
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


def _u2net(name: Literal["u2netp", "u2net"], parameters_m: float) -> Preset:
    return Preset(
        name=name,
        architecture=name,
        repository="",
        licence="Apache-2.0",
        input_size=(320, 320),
        parameters_m=parameters_m,
    )


def _birefnet(name: str, repository: str, *, size: int = 1024, lite: bool = False) -> Preset:
    return Preset(
        name=name,
        architecture="birefnet",
        repository=repository,
        licence="MIT",
        input_size=(size, size),
        parameters_m=44.3 if lite else 220.2,
        backbone="swin_v1_t" if lite else "swin_v1_l",
        patch_order="channels_first",
    )


_RMBG = dataclasses.replace(
    _birefnet("rmbg-2.0", "briaai/RMBG-2.0"),
    licence="CC BY-NC 4.0",
    patch_order="columns_first",
    statements=("commercial-agreement", "non-commercial"),
)
_ALL = (
    _u2net("u2netp", 1.1),
    _u2net("u2net", 44.0),
    _RMBG,
    _birefnet("birefnet", "ZhengPeng7/BiRefNet"),
    _birefnet("birefnet-lite", "ZhengPeng7/BiRefNet_lite", lite=True),
    _birefnet("birefnet-hr", "ZhengPeng7/BiRefNet_HR", size=2048),
    _birefnet("birefnet-matting", "ZhengPeng7/BiRefNet-matting"),
    _birefnet("birefnet-portrait", "ZhengPeng7/BiRefNet-portrait"),
    _birefnet("birefnet-dynamic", "ZhengPeng7/BiRefNet_dynamic"),
)

PRESETS: Mapping[str, Preset] = {preset.name: preset for preset in _ALL}


def find_preset(name: str) -> Preset:
    """Raises `ModelError` (`model_unknown`) that lists the presets."""
    if name not in PRESETS:
        raise ModelError(f"There is no model preset {name!r}. Known: {', '.join(PRESETS)}.")
    return PRESETS[name]


def check_licence(preset: Preset, stated: str) -> str:
    """Return the statement in `stated` (`NAME:STATEMENT`) for this preset; empty if its licence requires none. Raises
    `ModelError` (`licence_not_stated`)."""
    if not preset.statements:
        return ""
    name, _, statement = stated.strip().partition(":")
    if name == preset.name and statement in preset.statements:
        return statement
    choices = " or ".join(f"{preset.name}:{choice}" for choice in preset.statements)
    raise ModelError(
        f"{preset.name} is licensed under {preset.licence}: commercial use needs an agreement with its owner. State "
        f"which applies to you: CUTFLEET_ACCEPT_LICENCE={choices} (is {stated!r}).",
        code="licence_not_stated",
    )
