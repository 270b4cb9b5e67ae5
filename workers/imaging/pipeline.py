"""One image through all stages, in order: decode, shrink, predict, enlarge, clean the edges, measure, encode."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Literal, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from jobs.job import Remark
from jobs.recipe import Recipe
from workers.imaging.decode import DecodedImage, Limits, decode_image
from workers.imaging.edges import clean_edges
from workers.imaging.encode import encode_cutout_png, encode_mask_png
from workers.imaging.quality import measure_mask, review_reasons
from workers.imaging.renditions import Encoded, render_all
from workers.imaging.resize import enlarge, shrink

Pixels = NDArray[np.uint8]


class MaskPredictor(Protocol):
    """`input_size`: (height, width)."""

    @property
    def input_size(self) -> tuple[int, int]: ...

    def predict(self, rgb: Pixels, *, live: bool = False) -> Pixels:
        """`rgb`: (H, W, 3) uint8 of `input_size`. Returns the mask, (H, W) uint8, 255 is subject."""
        ...


class Decoder(Protocol):
    """`decode_image`, or something around it: in a child process, or with a note of when decoding begins."""

    def __call__(self, data: bytes, *, limits: Limits, animation: Literal["first", "refuse"]) -> DecodedImage: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outputs:
    """`cutout`, `mask`: whole files; `mask` empty where the one that is stored stays. `renditions`: by name; none where
    there is no subject. `quality`: figures by name. `review`: why a person should look; empty is fine. `notes`: what
    decoding ignored or scaled. `seconds`: wall time of `decode`, `device` (waiting included) and `encode`.
    """

    cutout: bytes
    mask: bytes
    width: int
    height: int
    quality: Mapping[str, float]
    review: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: Mapping[str, float]
    renditions: Mapping[str, Encoded]
    cutout_type: str = "image/png"
    mask_type: str = "image/png"

    def remark(self, key: str) -> Remark:
        rules = {name: made.findings for name, made in self.renditions.items() if made.checks}
        return Remark(key, self.review, self.quality, rules)


def limit_threads(torch_threads: int) -> None:
    """One thread an image outside the model: images run beside each other instead. `torch_threads`: for a model
    on the CPU; 1 when the device is a GPU. Call once per process, before the first image.
    """
    cv2.setNumThreads(1)
    torch.set_num_threads(torch_threads)


def cut_out(
    data: bytes,
    recipe: Recipe,
    predictor: MaskPredictor,
    *,
    limits: Limits,
    live: bool = False,
    text: Mapping[str, str] | None = None,
    decode: Decoder = decode_image,
) -> Outputs:
    """`text`: provenance kept in every PNG but the mask. Raises `ContentError`, and what `predictor` raises."""
    started = time.perf_counter()
    image = decode(data, limits=limits, animation=recipe.animation)
    if recipe.alpha == "ignore":
        image = dataclasses.replace(image, alpha=None)
    small = shrink_for_model(image, predictor.input_size)
    decoded = time.perf_counter()
    mask = predictor.predict(small, live=live)
    predicted = time.perf_counter()
    alpha = combine_alpha(enlarge(mask, image.rgb.shape[:2]), image.alpha, recipe)
    if recipe.edges == "estimate" and image.alpha is None:
        clean_edges(image.rgb, alpha)
    outputs = encode_outputs(image, alpha, recipe, text=text or {})
    seconds = {
        "decode": decoded - started,
        "device": predicted - decoded,
        "encode": time.perf_counter() - predicted,
    }
    return dataclasses.replace(outputs, seconds=seconds)


def shrink_for_model(image: DecodedImage, size: tuple[int, int]) -> Pixels:
    """(h, w, 3) of `size`. What is transparent is shown on white, as a shop would: the colours hidden under it are
    nothing that the model should see.
    """
    small = shrink(image.rgb, size)
    if image.alpha is None:
        return small
    share = enlarge(image.alpha, size)[..., None].astype(np.uint16)
    return ((small * share + 255 * (255 - share) + 127) // 255).astype(np.uint8)


def combine_alpha(mask: Pixels, alpha: Pixels | None, recipe: Recipe) -> Pixels:
    """`mask`, `alpha`: (H, W); `alpha` is the source's own, None where nothing is transparent."""
    if alpha is None:
        return mask
    if recipe.alpha == "keep":
        return alpha
    return np.asarray(cv2.multiply(mask, alpha, scale=1 / 255), np.uint8)


def encode_outputs(image: DecodedImage, alpha: Pixels, recipe: Recipe, *, text: Mapping[str, str]) -> Outputs:
    """All that is made of a cutout, which `image.rgb` with `alpha` is; needs no model."""
    credit = image.credit if recipe.keep_credit else ()
    made = render_outputs(image, alpha, recipe, text=text)
    cutout = encode_cutout_png(image.rgb, alpha, text={**text, **dict(credit)})
    return dataclasses.replace(made, cutout=cutout, mask=encode_mask_png(alpha))


def render_outputs(image: DecodedImage, alpha: Pixels, recipe: Recipe, *, text: Mapping[str, str]) -> Outputs:
    """Renditions and figures; `cutout` and `mask` are empty."""
    quality = measure_mask(alpha)
    credit = image.credit if recipe.keep_credit else ()
    renditions = render_all(image.rgb, alpha, recipe.renditions, credit=credit, text=text)
    broken = any(check.verdict == "fail" for made in renditions.values() for check in made.checks)
    return Outputs(
        cutout=b"",
        mask=b"",
        width=alpha.shape[1],
        height=alpha.shape[0],
        quality=quality,
        review=review_reasons(quality, recipe.review) + (("rules",) if broken else ()),
        notes=image.notes,
        seconds={},
        renditions=renditions,
    )
