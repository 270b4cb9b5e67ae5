"""Recipe: which model, and which outputs are made from its mask. Parsing validates all of it.

Everything that changes pixels is part of its fingerprint. Names, headers, rules and review thresholds are not: changing
them recomputes nothing. A recipe is a TOML file, or the name of one in `jobs/recipes/`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from jobs.errors import OutputError, SettingsError

PIPELINE_VERSION = 2
"""Part of every fingerprint; increased when the same recipe gives other pixels (a golden test enforces it)."""

EXTENSIONS = {"jpeg": ("jpg", "jpeg"), "png": ("png",), "webp": ("webp",)}
"""By format, the usual one first. Marketplaces refuse a file whose extension and content differ."""

MAX_RENDITIONS = 16
"""The cutout's metadata holds the ETag of each rendition, and S3 limits metadata to 2 KB."""

OWN_FOLDERS = ("cutouts/", "masks/", "_cutfleet/")
"""Folders below the destination that no rendition may use."""

_FIXED = ConfigDict(extra="forbid")
_FIELD = re.compile(r"\{(\w*)\}")
_UNIQUE_FIELDS = ("path", "stem", "sku")
"""A rendition path must hold one of them, else every image would get the same name."""

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, kw_only=True, config=_FIXED)
class Delivery:
    """Headers and storage of an output in S3. `kms_key`: id or ARN for SSE-KMS. Empty: the bucket's default."""

    cache_control: str = ""
    storage_class: str = ""
    kms_key: str = ""


@dataclass(frozen=True, kw_only=True, config=_FIXED)
class Rules:
    """A marketplace's rules, which each rendition is measured against. 0: no limit. `source`: where the rules were
    read; `secondary`: not the marketplace's own page. `fill`: longest side of the subject divided by the frame's."""

    source: str = ""
    secondary: bool = False
    min_px: Count = 0
    advised_px: Count = 0
    max_px: Count = 0
    max_mb: Annotated[float, Field(ge=0)] = 0
    min_fill: Share = 0
    max_fill: Share = 1
    exact_background: bool = False


@dataclass(frozen=True, kw_only=True, config=_FIXED)
class Rendition:
    """One more output made from cutout and mask.

    `canvas`: `source` keeps the frame; `trim` crops it to the subject plus `margin`, a share of the subject's longest
    side; `square` centres the subject and lets its longest side take `fill` of the frame. `min_px`, `max_px` limit the
    frame's longest side (0: no limit). The subject is never enlarged beyond `max_upscale`: a small subject fills less
    of a frame of `min_px`. `quality`: of JPEG, and of WebP unless `lossless`. `path`: its name below the destination,
    with the fields `{path}` (relative key), `{stem}` (without extension), `{rendition}`, `{ext}`, and the named groups
    of the recipe's `key_pattern`, such as `{sku}` and `{variant}`."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    format: Literal["jpeg", "png", "webp"] = "jpeg"
    quality: Annotated[int, Field(ge=1, le=100)] = 92
    lossless: bool = False
    background: Annotated[str, Field(pattern=r"^(transparent|#[0-9a-fA-F]{6})$")] = "#ffffff"
    canvas: Literal["source", "trim", "square"] = "source"
    margin: Share = 0.0
    fill: Annotated[float, Field(gt=0, le=1)] = 0.85
    min_px: Count = 0
    max_px: Annotated[int, Field(ge=0, le=16383)] = 0
    max_upscale: Annotated[float, Field(ge=1, le=8)] = 1.0
    path: str = "{rendition}/{path}.{ext}"
    delivery: Delivery = Delivery()
    rules: Rules | None = None

    @property
    def content_type(self) -> str:
        return f"image/{self.format}"

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.format == "jpeg" and self.background == "transparent":
            raise ValueError("JPEG has no transparency: set a background colour, or format png or webp")
        if self.lossless and self.format != "webp":
            raise ValueError("lossless is for webp: png always is, jpeg never")
        if self.max_px and self.min_px > self.max_px:
            raise ValueError(f"min_px {self.min_px} is above max_px {self.max_px}")
        _check_path(self)
        return self


@dataclass(frozen=True, kw_only=True, config=_FIXED)
class Review:
    """Thresholds that flag a mask for review; `workers/imaging/quality.py` defines the figures. The defaults flag 8 of
    10 bad masks and 3 of 36 good ones (`tests/bench/quality.py`). `max_border` 1 never flags: portraits and details
    cross the border; marketplaces need the whole product and set it. `max_pieces` 2: shoes come in pairs."""

    min_subject: Share = 0.005
    max_subject: Share = 0.98
    max_uncertain: Share = 0.35
    max_border: Share = 1.0
    max_pieces: Count = 2
    max_holes: Count = 8


@dataclass(frozen=True, kw_only=True, config=_FIXED)
class Recipe:
    """`edges`: estimate the subject's colour in soft pixels, or leave the old background's colour.
    `alpha`: use of the source's alpha channel: multiply it with the mask, keep it instead, or ignore it.
    `animation`: take the first frame of an animated or multi-page source, or refuse it (`animated`).
    `keep_credit`: copy artist and copyright into the outputs; no other metadata is copied.
    `key_pattern`: regular expression searched in the relative key, whose named groups are fields of rendition paths.
    """

    model: str = "u2netp"
    edges: Literal["off", "estimate"] = "estimate"
    alpha: Literal["multiply", "keep", "ignore"] = "multiply"
    animation: Literal["first", "refuse"] = "first"
    keep_credit: bool = False
    key_pattern: str = ""
    cutout: Delivery = Delivery()
    mask: Delivery = Delivery()
    review: Review = Review()
    renditions: Annotated[tuple[Rendition, ...], Field(max_length=MAX_RENDITIONS)] = ()

    @model_validator(mode="after")
    def _names_are_apart(self) -> Self:
        groups = _groups(self.key_pattern)
        paths: dict[str, str] = {}
        for rendition in self.renditions:
            unknown = set(_FIELD.findall(rendition.path)) - {"path", "stem", "rendition", "ext", *groups}
            if unknown:
                raise ValueError(
                    f"the path of {rendition.name!r} has fields {sorted(unknown)}, which are neither known nor named "
                    f"groups of key_pattern {self.key_pattern!r}"
                )
            path = _fill_path(rendition)
            if path in paths:
                raise ValueError(f"renditions {paths[path]!r} and {rendition.name!r} would have the same names: {path}")
            paths[path] = rendition.name
        return self

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Raises `SettingsError` for a field or value that this version does not know."""
        return _validated(json.loads(text), where="The recipe")

    def fingerprint(self, *, model_revision: str, input_size: tuple[int, int]) -> str:
        """Return `MODEL-RENDITION`, 12 hex digits each: how the mask is made, and what is made from it."""
        model = [PIPELINE_VERSION, self.model, model_revision, *input_size, self.alpha, self.animation]
        return f"{_digest(model)}-{self.rendition_fingerprint()}"

    def rendition_fingerprint(self) -> str:
        """Return the part of the fingerprint after the dash."""
        pixels = [_pixel_fields(rendition) for rendition in self.renditions]
        return _digest([PIPELINE_VERSION, self.edges, self.keep_credit, pixels])

    def rendition_path(self, rendition: Rendition, relative: str) -> str:
        """Return the rendition's name below the destination. `relative`: the source's key below its prefix. Raises
        `OutputError` (`name_unmatched`) when the key does not match `key_pattern`.
        """
        fields = {"path": relative, "stem": re.sub(r"\.[^./]*$", "", relative)}
        if set(_FIELD.findall(rendition.path)) & set(_groups(self.key_pattern)):
            match = re.search(self.key_pattern, relative)
            if match is None or None in match.groupdict().values():
                raise OutputError(
                    f"{relative!r} does not match the recipe's key_pattern {self.key_pattern!r}.", code="name_unmatched"
                )
            fields |= match.groupdict()
        return _FIELD.sub(lambda field: fields[field[1]], _fill_path(rendition))

    def rendition_folder(self, rendition: Rendition) -> str:
        """Return the folder that all paths of `rendition` begin with; may be empty."""
        fixed = _fill_path(rendition).partition("{")[0]
        return fixed[: fixed.rfind("/") + 1]


def load_recipe(name_or_path: str, *, model: str = "u2netp") -> Recipe:
    """Load a built-in recipe by name, or a file whose path ends with `.toml`. `model`: used when the recipe names none.
    Raises `SettingsError` that names every invalid field.
    """
    text = Path(name_or_path).read_text("utf-8") if _is_file(name_or_path) else recipe_text(name_or_path)
    try:
        fields = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise SettingsError(f"{name_or_path} is not valid TOML: {exc}.") from exc
    return _validated({"model": model} | fields, where=f"Recipe {name_or_path}")


def recipe_names() -> list[str]:
    """Return the names of the built-in recipes."""
    files = resources.files("jobs").joinpath("recipes").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def recipe_text(name: str) -> str:
    """Return a built-in recipe as TOML. Raises `SettingsError` for an unknown name."""
    if name not in recipe_names():
        raise SettingsError(
            f"There is no recipe {name!r}: give a file that ends with .toml, or one of {', '.join(recipe_names())}."
        )
    return resources.files("jobs").joinpath("recipes", f"{name}.toml").read_text("utf-8")


def _is_file(name_or_path: str) -> bool:
    if not name_or_path.endswith(".toml"):
        return False
    if not Path(name_or_path).is_file():
        raise SettingsError(f"There is no recipe file {name_or_path!r}.")
    return True


def _validated(fields: Mapping[str, Any], *, where: str) -> Recipe:
    try:
        return TypeAdapter(Recipe).validate_python(fields)
    except ValidationError as exc:
        problems = (
            f"{'.'.join(str(part) for part in error['loc']) or 'recipe'}: {error['msg'].removeprefix('Value error, ')}"
            for error in exc.errors()
        )
        raise SettingsError(f"{where} can't be used: {'; '.join(problems)}.") from exc


def _digest(part: list[Any]) -> str:
    return hashlib.sha256(json.dumps(part).encode()).hexdigest()[:12]


def _pixel_fields(rendition: Rendition) -> dict[str, Any]:
    fields = dataclasses.asdict(rendition)
    return {name: fields[name] for name in sorted(fields) if name not in ("path", "delivery", "rules")}


def _check_path(rendition: Rendition) -> None:
    path = _fill_path(rendition)
    if path.startswith(("/", *OWN_FOLDERS)) or ".." in path.split("/"):
        raise ValueError(f"path {rendition.path!r} must be relative, and not in {', '.join(OWN_FOLDERS)}")
    allowed = tuple(f".{extension}" for extension in EXTENSIONS[rendition.format])
    if not path.endswith(allowed):
        raise ValueError(f"path {rendition.path!r} must end with {' or '.join(allowed)}, to match the content")
    if not set(_FIELD.findall(path)) & set(_UNIQUE_FIELDS):
        raise ValueError(
            f"path {rendition.path!r} would be the same for every image: use {{path}}, {{stem}} or {{sku}}"
        )


def _fill_path(rendition: Rendition) -> str:
    """Return the rendition's path with the fields filled in that do not depend on the image."""
    extension = EXTENSIONS[rendition.format][0]
    return rendition.path.replace("{rendition}", rendition.name).replace("{ext}", extension)


def _groups(pattern: str) -> list[str]:
    try:
        return list(re.compile(pattern).groupindex)
    except re.error as exc:
        raise ValueError(f"key_pattern {pattern!r} is no regular expression: {exc}") from exc
