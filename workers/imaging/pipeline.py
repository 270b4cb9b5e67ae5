"""Cut out one image: decode, shrink, predict the mask, enlarge it, clean the edges, measure, encode."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Literal, Protocol

import cv2
import numpy as np

from jobs.recipe import Recipe
from jobs.results import ImageNote, Verdict
from workers.imaging.decode import DecodedImage, Limits, decode_image
from workers.imaging.edges import clean_edges
from workers.imaging.encode import encode_cutout_png, encode_mask_png
from workers.imaging.pixels import Pixels
from workers.imaging.quality import measure_mask, review_reasons
from workers.imaging.renditions import Encoded, render_all
from workers.imaging.resize import enlarge, shrink


class MaskPredictor(Protocol):
    """Computes masks; `workers.models.batcher.Batcher` is one."""

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the images that it takes."""
        ...

    def predict(self, rgb: Pixels, *, live: bool = False) -> Pixels:
        """Return the mask (H, W), 255 is subject. `rgb`: (H, W, 3) of `input_size`. `live`: before backfill images."""
        ...


class Decoder(Protocol):
    """`decode_image`, or a function with the same contract, such as one that decodes in a subprocess."""

    def __call__(self, data: bytes, *, limits: Limits, animation: Literal["first", "refuse"]) -> DecodedImage: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outputs:
    """`cutout`, `mask`: files; `mask` is empty if the stored one stays. `renditions`: by name; empty if there is no
    subject. `quality`: figures by name. `review`: reasons for a review, empty if there are none. `notes`: what decoding
    ignored or scaled. `seconds`: wall time of `decode`, `device` (including the wait) and `encode`.
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

    def note(self, key: str) -> ImageNote:
        rules = {name: rendition.findings for name, rendition in self.renditions.items() if rendition.checks}
        return ImageNote(key, self.review, self.quality, rules)


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
    """Return the files and figures for the image in `data`. `text`: provenance for the text chunks of every PNG but the
    mask. Raises `ContentError`, and what `predictor` raises.
    """
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
    """Return (h, w, 3) of `size`. Transparent pixels become white, as in a shop: the model must not see the colours
    that they hide.
    """
    small = shrink(image.rgb, size)
    if image.alpha is None:
        return small
    share = enlarge(image.alpha, size)[..., None].astype(np.uint16)
    return ((small * share + 255 * (255 - share) + 127) // 255).astype(np.uint8)


def combine_alpha(mask: Pixels, alpha: Pixels | None, recipe: Recipe) -> Pixels:
    """Combine the mask with the source's own alpha, as `recipe.alpha` says. `mask`, `alpha`: (H, W); `alpha` is None if
    nothing is transparent.
    """
    if alpha is None:
        return mask
    if recipe.alpha == "keep":
        return alpha
    return np.asarray(cv2.multiply(mask, alpha, scale=1 / 255), np.uint8)


def encode_outputs(image: DecodedImage, alpha: Pixels, recipe: Recipe, *, text: Mapping[str, str]) -> Outputs:
    """Encode `image.rgb` with `alpha` as cutout and mask, and make the renditions; no model is needed."""
    credit = image.credit if recipe.keep_credit else ()
    outputs = render_outputs(image, alpha, recipe, text=text)
    cutout = encode_cutout_png(image.rgb, alpha, text={**text, **dict(credit)})
    return dataclasses.replace(outputs, cutout=cutout, mask=encode_mask_png(alpha))


def render_outputs(image: DecodedImage, alpha: Pixels, recipe: Recipe, *, text: Mapping[str, str]) -> Outputs:
    """Make the renditions and measure the mask; `cutout` and `mask` stay empty."""
    quality = measure_mask(alpha)
    credit = image.credit if recipe.keep_credit else ()
    renditions = render_all(image.rgb, alpha, recipe.renditions, credit=credit, text=text)
    has_failed_rule = any(check.verdict is Verdict.FAIL for encoded in renditions.values() for check in encoded.checks)
    return Outputs(
        cutout=b"",
        mask=b"",
        width=alpha.shape[1],
        height=alpha.shape[0],
        quality=quality,
        review=review_reasons(quality, recipe.review) + (("rules",) if has_failed_rule else ()),
        notes=image.notes,
        seconds={},
        renditions=renditions,
    )
