"""The models by name: where each is, under which licence, and what it needs. Importable without torch, so that a name
can be checked where no model runs.

A preset says only what is known: an empty revision means that none was ever pinned; the first pull pins the one it got.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jobs.errors import ModelError

PatchOrder = Literal["columns_first", "channels_first"]
"""How BiRefNet's decoder cuts its input: `(wg hg c)`, patch by patch (RMBG-2.0 and code before 2024-11-05), or
`(c hg wg)` (code since). Checkpoints of both have the same keys and shapes; only the masks tell."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """`repository`: on the model hub; empty: in this package, or to be brought as a file. `input_size`: (height,
    width). `parameters_m`: millions of weights. `statements`: of which the licence asks the operator to state one.
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


_ALL = (
    Preset(
        name="u2netp",
        architecture="u2netp",
        repository="",
        licence="Apache-2.0",
        input_size=(320, 320),
        parameters_m=1.1,
    ),
    Preset(
        name="u2net",
        architecture="u2net",
        repository="",
        licence="Apache-2.0",
        input_size=(320, 320),
        parameters_m=44.0,
    ),
    Preset(
        name="rmbg-2.0",
        architecture="birefnet",
        repository="briaai/RMBG-2.0",
        licence="CC BY-NC 4.0",
        input_size=(1024, 1024),
        parameters_m=220.2,
        backbone="swin_v1_l",
        patch_order="columns_first",
        statements=("commercial-agreement", "non-commercial"),
    ),
    _birefnet("birefnet", "ZhengPeng7/BiRefNet"),
    _birefnet("birefnet-lite", "ZhengPeng7/BiRefNet_lite", lite=True),
    _birefnet("birefnet-hr", "ZhengPeng7/BiRefNet_HR", size=2048),
    _birefnet("birefnet-matting", "ZhengPeng7/BiRefNet-matting"),
    _birefnet("birefnet-portrait", "ZhengPeng7/BiRefNet-portrait"),
    _birefnet("birefnet-dynamic", "ZhengPeng7/BiRefNet_dynamic"),
)

PRESETS: Mapping[str, Preset] = {preset.name: preset for preset in _ALL}

RENDER = "render"
"""Stands in the place of a job's model where none is needed: renditions are made again from the stored cutouts."""

PULLED = ("config.json", "model.safetensors")
"""All that is fetched of a repository: its code is never needed."""

REVISION = re.compile(r"[0-9a-f]{40}")

PINS_NAME = "cutfleet-revisions.json"
"""In the hub's cache folder: preset -> the 40-digit revision that its first pull got, and every later one gets
that names no other."""


def find_preset(name: str) -> Preset:
    """Raises `ModelError` (`model_unknown`) that lists what there is."""
    if name not in PRESETS:
        raise ModelError(f"There is no model preset {name!r}; there are {', '.join(PRESETS)}.")
    return PRESETS[name]


def check_licence(preset: Preset, stated: str) -> str:
    """What `stated` (`NAME:STATEMENT`) says for this preset; empty where its licence asks for nothing.

    Raises `ModelError` (`licence_not_stated`).
    """
    if not preset.statements:
        return ""
    name, _, statement = stated.strip().partition(":")
    if name == preset.name and statement in preset.statements:
        return statement
    choices = " or ".join(f"{preset.name}:{choice}" for choice in preset.statements)
    raise ModelError(
        f"{preset.name} is licensed under {preset.licence}: commercial use needs an agreement with its owner. State "
        f"which holds for you: CUTFLEET_ACCEPT_LICENCE={choices} (is {stated!r}).",
        code="licence_not_stated",
    )


def describe_state(preset: Preset, *, cache: Path | None = None) -> str:
    """`built in`, `ready (REVISION)`, `not pulled`, or `bring a file`. Looks at this machine only."""
    if preset.name == "u2netp":
        return "built in"
    if not preset.repository:
        return "bring a file"
    try:
        folder = find_cached(preset, cache=cache)
    except ModelError:
        return "not on this machine, which has no hub client"
    return f"ready ({folder.name[:12]})" if folder else "not pulled"


def find_cached(preset: Preset, *, revision: str = "", cache: Path | None = None) -> Path | None:
    """The folder of a preset's files at `revision`, or the pinned one if it is empty; None unless all are here."""
    root = cache or _default_cache()
    revision = revision or preset.revision or _read_pins(root).get(preset.name, "")
    folder = root / f"models--{preset.repository.replace('/', '--')}" / "snapshots" / revision
    return folder if revision and all((folder / name).is_file() for name in PULLED) else None


def pull(preset: Preset, *, revision: str = "", cache: Path | None = None, endpoint: str | None = None) -> Path:
    """Fetches a preset's files at `revision`, or the pinned one, or today's; pins what it got; returns their folder.
    Safe to call twice.

    The token, the cache folder and offline mode are the hub client's own (`HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE`).
    Raises `ModelError`: `model_offline` if the hub can't be reached, `model_missing` if it has no such files,
    `revision_unclear` for a branch or a tag.
    """
    if not preset.repository:
        raise ModelError(
            f"{preset.name} is in no hub repository of its authors: fetch its file yourself and set CUTFLEET_MODEL to "
            "its path.",
            code="model_missing",
        )
    if revision and not REVISION.fullmatch(revision):
        raise ModelError(
            f"The revision of {preset.name} is {revision!r}; it must be all 40 digits, not a branch or a tag, which "
            "move.",
            code="revision_unclear",
        )
    root = cache or _default_cache()
    pins = _read_pins(root)
    wanted = revision or preset.revision or pins.get(preset.name)
    folder = fetch(preset.repository, revision=wanted, patterns=PULLED, cache=root, endpoint=endpoint)
    if missing := [name for name in PULLED if not (folder / name).is_file()]:
        raise ModelError(f"{preset.repository} has no {' and no '.join(missing)}.", code="model_missing")
    if pins.get(preset.name) != folder.name:
        _write_pins(root, {**pins, preset.name: folder.name})
    return folder


def fetch(
    repository: str,
    *,
    revision: str | None,
    patterns: tuple[str, ...],
    cache: Path | None = None,
    endpoint: str | None = None,
) -> Path:
    """The folder with the files of a hub repository, named after its revision; fetched unless it is in the cache.

    Raises `ModelError` (`model_offline`, `model_missing`).
    """
    hub = _hub_client()
    try:
        folder = hub.snapshot_download(
            repository, revision=revision, cache_dir=cache, allow_patterns=list(patterns), endpoint=endpoint
        )
    except hub.errors.GatedRepoError as exc:
        raise ModelError(
            f"The hub gives {repository} only to accounts that accepted its conditions: accept them on its "
            "page, then set HF_TOKEN.",
            code="model_missing",
        ) from exc
    except (hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError) as exc:
        raise ModelError(f"The hub has no {repository} at {revision or 'main'}.", code="model_missing") from exc
    except Exception as exc:  # the client raises its HTTP library's own errors, which differ between its releases
        raise ModelError(
            f"The files of {repository} are not on this machine and the hub can't be reached ({exc}). Run `cutfleet "
            "models pull` for it where there is a network, or set CUTFLEET_MODEL to a folder with its files.",
            code="model_offline",
        ) from exc
    return Path(folder)


def _hub_client() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as exc:
        raise ModelError(
            "Fetching models needs the hub's client: pip install 'cutfleet[worker]'.", code="model_missing"
        ) from exc
    return huggingface_hub


def _default_cache() -> Path:
    return Path(_hub_client().constants.HF_HUB_CACHE)


def _read_pins(cache: Path) -> dict[str, str]:
    path = cache / PINS_NAME
    if not path.is_file():
        return {}
    pins: dict[str, str] = json.loads(path.read_text("utf-8"))
    return pins


def _write_pins(cache: Path, pins: Mapping[str, str]) -> None:
    """Whole or not at all: two workers may pull at once."""
    part = cache / f".{PINS_NAME}.{os.getpid()}"
    part.write_text(json.dumps(pins, indent=1, sort_keys=True), "utf-8")
    part.replace(cache / PINS_NAME)
