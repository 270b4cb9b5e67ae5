"""Recipe: which model, and which images are made of its mask. It is checked in full when it is parsed, without a
pixel. Everything that changes pixels is in its fingerprint; what only delivers or judges them (names, headers, rules,
review) is not, so that changing it makes no image again.

A recipe is a TOML file, or the name of one that ships in `jobs/recipes/`.
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
"""Part of every fingerprint; raised when the same recipe gives other pixels (a golden test forces it)."""

EXTENSIONS = {"jpeg": ("jpg", "jpeg"), "png": ("png",), "webp": ("webp",)}
"""By format, the usual one first; shops refuse a file whose name says another format than its content."""

MAX_RENDITIONS = 16
"""The cutout's metadata, 2 KB at most, names the ETag of each."""

OWN_FOLDERS = ("cutouts/", "masks/", "_cutfleet/")
"""Below the destination; no rendition goes there."""

_FIXED = ConfigDict(extra="forbid")
_FIELD = re.compile(r"\{(\w*)\}")
_UNIQUE_FIELDS = ("path", "stem", "sku")
"""A name must hold one of them, else every image would get the same name."""

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, kw_only=True, config=_FIXED)
class Delivery:
    """How S3 keeps an output. `kms_key`: its id or ARN, for SSE-KMS. Empty: as the bucket says."""

    cache_control: str = ""
    storage_class: str = ""
    kms_key: str = ""


@dataclass(frozen=True, kw_only=True, config=_FIXED)
class Rules:
    """What a marketplace asks of an image; each rendition is measured against them. 0: no limit. `source`: where the
    rule was read; `secondary`: not in the marketplace's own words. `fill`: longest side of the subject by the frame's.
    """

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
    """One more image made of cutout and mask.

    `canvas`: `source` keeps the frame; `trim` cuts it to the subject with `margin`, a share of the subject's longest
    side, around it; `square` centres the subject and lets its longest side take `fill` of the frame. `min_px`, `max_px`
    bound the frame's longest side (0: no bound); the subject is never enlarged beyond `max_upscale`: with a small one
    the frame still has `min_px`, and the fill is less. `quality`: of JPEG, and of WebP unless `lossless`.
    `path`: its name below the destination; fields `{path}` (relative key), `{stem}` (without extension), `{rendition}`,
    `{ext}`, and the groups of the recipe's `key_pattern`, such as `{sku}` and `{variant}`.
    """

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
    """When a person should look at an image; figures as `workers/imaging/quality.py` defines them. By default the thresholds
    flag 8 of 10 bad masks and 3 of 36 good ones (`tests/bench/quality.py`). `max_border` 1: never, since portraits and
    details run out of their frame; marketplaces, which want the whole product, set it. `max_pieces` 2: shoes
    come in pairs.
    """

    min_subject: Share = 0.005
    max_subject: Share = 0.98
    max_uncertain: Share = 0.35
    max_border: Share = 1.0
    max_pieces: Count = 2
    max_holes: Count = 8


@dataclass(frozen=True, kw_only=True, config=_FIXED)
class Recipe:
    """`edges`: estimate the subject's colour in soft pixels, or leave the old background's in.
    `alpha`: what an alpha channel of the source does: multiplied with the mask, kept instead of it, or ignored.
    `animation`: of an animated or multi-page source take the first frame, or refuse it (`animated`).
    `keep_credit`: copy artist and copyright into the outputs; no other metadata is ever kept.
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
            path = _settle(rendition)
            if path in paths:
                raise ValueError(f"renditions {paths[path]!r} and {rendition.name!r} would have the same names: {path}")
            paths[path] = rendition.name
        return self

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Raises `SettingsError` on a field or value that this version does not know."""
        return _validated(json.loads(text), where="The recipe")

    def fingerprint(self, *, model_revision: str, input_size: tuple[int, int]) -> str:
        """`MODEL-RENDITION`, 12 hex digits each: what made the mask, and what was made from it."""
        model = [PIPELINE_VERSION, self.model, model_revision, *input_size, self.alpha, self.animation]
        return f"{_digest(model)}-{self.rendition_fingerprint()}"

    def rendition_fingerprint(self) -> str:
        """The part after the dash."""
        pixels = [_pixel_fields(rendition) for rendition in self.renditions]
        return _digest([PIPELINE_VERSION, self.edges, self.keep_credit, pixels])

    def rendition_path(self, rendition: Rendition, relative: str) -> str:
        """Where it goes below the destination. `relative`: the source's key below its prefix. Raises `OutputError`
        (`name_unmatched`) when the key does not fit `key_pattern`.
        """
        fields = {"path": relative, "stem": re.sub(r"\.[^./]*$", "", relative)}
        if set(_FIELD.findall(rendition.path)) & set(_groups(self.key_pattern)):
            match = re.search(self.key_pattern, relative)
            if match is None or None in match.groupdict().values():
                raise OutputError(
                    f"{relative!r} does not fit the recipe's key_pattern {self.key_pattern!r}.", code="name_unmatched"
                )
            fields |= match.groupdict()
        return _FIELD.sub(lambda field: fields[field[1]], _settle(rendition))

    def rendition_folder(self, rendition: Rendition) -> str:
        """What all its paths begin with: a folder, or nothing."""
        fixed = _settle(rendition).partition("{")[0]
        return fixed[: fixed.rfind("/") + 1]


def load_recipe(name_or_path: str, *, model: str = "u2netp") -> Recipe:
    """A built-in's name, or a path that ends with `.toml`. `model`: where the recipe names none. Raises `SettingsError`
    naming every field that is wrong.
    """
    text = Path(name_or_path).read_text("utf-8") if _is_file(name_or_path) else recipe_text(name_or_path)
    try:
        fields = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise SettingsError(f"{name_or_path} is not valid TOML: {exc}.") from exc
    return _validated({"model": model} | fields, where=f"Recipe {name_or_path}")


def recipe_names() -> list[str]:
    """The built-in recipes."""
    files = resources.files("jobs").joinpath("recipes").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def recipe_text(name: str) -> str:
    """A built-in's TOML, to be shown and copied. Raises `SettingsError` when there is none of that name."""
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
    told = dataclasses.asdict(rendition)
    return {name: told[name] for name in sorted(told) if name not in ("path", "delivery", "rules")}


def _check_path(rendition: Rendition) -> None:
    path = _settle(rendition)
    if path.startswith(("/", *OWN_FOLDERS)) or ".." in path.split("/"):
        raise ValueError(f"path {rendition.path!r} must be relative, and not in {', '.join(OWN_FOLDERS)}")
    allowed = tuple(f".{extension}" for extension in EXTENSIONS[rendition.format])
    if not path.endswith(allowed):
        raise ValueError(f"path {rendition.path!r} must end with {' or '.join(allowed)}, as the content is")
    if not set(_FIELD.findall(path)) & set(_UNIQUE_FIELDS):
        raise ValueError(
            f"path {rendition.path!r} would be the same for every image: use {{path}}, {{stem}} or {{sku}}"
        )


def _settle(rendition: Rendition) -> str:
    """Its path with the fields filled that do not depend on the image."""
    extension = EXTENSIONS[rendition.format][0]
    return rendition.path.replace("{rendition}", rendition.name).replace("{ext}", extension)


def _groups(pattern: str) -> list[str]:
    try:
        return list(re.compile(pattern).groupindex)
    except re.error as exc:
        raise ValueError(f"key_pattern {pattern!r} is no regular expression: {exc}") from exc
