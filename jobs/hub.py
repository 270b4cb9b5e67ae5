"""Fetches model files from a hub into its cache, at a pinned revision."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.catalogue import Preset
from jobs.errors import ModelError

PULLED = ("config.json", "model.safetensors")
"""The files fetched from a repository: its code is never needed."""

REVISION = re.compile(r"[0-9a-f]{40}")

PINS_NAME = "cutfleet-revisions.json"
"""In the hub's cache folder: preset -> 40-digit revision of its first pull, used by later pulls that name none."""


def describe_state(preset: Preset, *, cache: Path | None = None) -> str:
    """Return `built in`, `ready (REVISION)`, `not pulled` or `bring a file`. Checks this machine only."""
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
    """Return the folder of a preset's files at `revision`, empty: the pinned one; None unless all files are cached."""
    root = cache or _default_cache()
    revision = revision or preset.revision or _read_pins(root).get(preset.name, "")
    folder = root / f"models--{preset.repository.replace('/', '--')}" / "snapshots" / revision
    return folder if revision and all((folder / name).is_file() for name in PULLED) else None


def pull(preset: Preset, *, revision: str = "", cache: Path | None = None, endpoint: str | None = None) -> Path:
    """Fetch a preset's files at `revision`, else at the pinned revision, else at the latest; pin it; return the folder.
    Safe to call twice.

    The token, the cache folder and offline mode are settings of the hub client (`HF_TOKEN`, `HF_HOME`,
    `HF_HUB_OFFLINE`). Raises `ModelError`: `model_offline` if the hub is unreachable, `model_missing` if it has no such
    files, `revision_unclear` for a branch or a tag."""
    if not preset.repository:
        raise ModelError(
            f"{preset.name} is in no hub repository of its authors: download its file and set CUTFLEET_MODEL to "
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
    """Return the folder with the files of a hub repository, named after its revision; fetch it unless it is cached.

    Raises `ModelError` (`model_offline`, `model_missing`).
    """
    hub = _hub_client()
    try:
        folder = hub.snapshot_download(
            repository, revision=revision, cache_dir=cache, allow_patterns=list(patterns), endpoint=endpoint
        )
    except hub.errors.GatedRepoError as exc:
        raise ModelError(
            f"The hub serves {repository} only to accounts that accepted its conditions: accept them on its page, then "
            "set HF_TOKEN.",
            code="model_missing",
        ) from exc
    except (hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError) as exc:
        raise ModelError(f"The hub has no {repository} at {revision or 'main'}.", code="model_missing") from exc
    except Exception as exc:  # the client raises its HTTP library's errors, which differ between releases
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
    """Atomic: two workers may pull at once."""
    part = cache / f".{PINS_NAME}.{os.getpid()}"
    part.write_text(json.dumps(pins, indent=1, sort_keys=True), "utf-8")
    part.replace(cache / PINS_NAME)
