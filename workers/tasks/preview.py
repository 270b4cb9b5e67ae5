"""Small images of one image for a person to look at: source and cutout whole, and both at full size where the edge is
worst. Made when somebody reviews a job, from what stands in S3 by then; nothing is paid for it while images are cut.
"""

from __future__ import annotations

import base64
import dataclasses
import io

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jobs.errors import ImageError
from jobs.job import Job
from jobs.message import ImageTask
from jobs.preview import Preview
from jobs.recipe import Recipe
from jobs.s3.client import Names, Store, rendition_names
from workers.imaging.decode import DecodedImage, Limits
from workers.imaging.quality import find_worst_edge
from workers.process.image_context import Seat
from workers.tasks.publish import Target, find_existing
from workers.tasks.rerender import cutout_limits, fetch_cutout

Pixels = NDArray[np.uint8]

_WHOLE, _THUMB, _EDGE = 640, 160, 360
"""Longest side of the whole image, of the one in a list of many, and side of the worst edge, in pixels."""
_REMOVED = 0.25
"""Of what was removed, how much shows in a list of many."""
_WHOLE_QUALITY, _EDGE_QUALITY = 75, 90
"""Of WebP, whose alpha is exact. At 90 the colour of soft pixels, on black and on white, is 1.6 grey levels off (11
photographs of hair and fur), for a third of the bytes of lossless."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """`thumb`: (h, w, 4)."""

    shown: Preview
    thumb: Pixels | None = None

    def finished(self) -> Preview:
        thumb = {} if self.thumb is None else {"thumb": _webp(self.thumb, _WHOLE_QUALITY)}
        return dataclasses.replace(self.shown, images={**self.shown.images, **thumb})


def make_preview(task: ImageTask, job: Job, names: Names, seat: Seat, *, store: Store, limits: Limits) -> Preview:
    """Says in `notes` what can't be shown of cutout or source, and why. Raises what is to be tried again."""
    drawn, notes = Drawn(Preview(etag=task.etag)), []
    try:
        drawn = _show_cutout(task, job, names, seat, store=store, limits=limits) or drawn
    except ImageError as exc:
        notes.append(f"cutout: {exc} [{exc.code}]")
    try:
        drawn = _show_source(drawn, names, seat, store=store, limits=limits)
    except ImageError as exc:
        notes.append(f"source: {exc} [{exc.code}]")
    return dataclasses.replace(drawn.finished(), notes=tuple(notes))


def _show_cutout(task: ImageTask, job: Job, names: Names, seat: Seat, *, store: Store, limits: Limits) -> Drawn | None:
    """None where there is no cutout."""
    recipe = Recipe.from_json(job.recipe)
    places = rendition_names(recipe, job.source, job.destination, task.key)
    target = Target(names=names, renditions=places, recipe=recipe, conditional=job.conditional)
    existing = find_existing(target, store)
    found = existing.cutout
    if found is None:
        return None
    remark = existing.remark(task.key)
    shown = Preview(
        etag=found.metadata.get("cf-source-etag", ""),
        model=found.metadata.get("cf-model", ""),
        job=found.metadata.get("cf-job", ""),
        figures=remark.figures,
        review=remark.review,
        complaints=tuple(remark.complaints()),
    )
    data = fetch_cutout(found, store, target, limits)
    with seat.room(data), seat.computing():
        return draw_cutout(seat.decode(data, limits=cutout_limits(limits), animation="first"), shown)


def draw_cutout(image: DecodedImage, shown: Preview) -> Drawn:
    """`shown`: what is told of it."""
    rgb, alpha = image.rgb, _alpha_of(image)
    rows, columns = find_worst_edge(alpha, _EDGE)
    shown = dataclasses.replace(
        shown,
        width=alpha.shape[1],
        height=alpha.shape[0],
        edge=(columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start),
        images={
            "after": _webp(_reduced(rgb, alpha, _WHOLE), _WHOLE_QUALITY),
            "edge_after": _webp(np.dstack([rgb[rows, columns], alpha[rows, columns]]), _EDGE_QUALITY),
        },
    )
    return Drawn(shown, _reduced(rgb, alpha, _THUMB))


def _show_source(drawn: Drawn, names: Names, seat: Seat, *, store: Store, limits: Limits) -> Drawn:
    """The version that the cutout was made from."""
    data, _ = store.get(names.source, role="source", etag=drawn.shown.etag, max_bytes=limits.max_bytes)
    with seat.room(data), seat.computing():
        return draw_source(seat.decode(data, limits=limits, animation="first"), drawn)


def draw_source(image: DecodedImage, drawn: Drawn) -> Drawn:
    """On white where it is transparent. `drawn`: of its cutout."""
    rgb, alpha, shown = image.rgb, _alpha_of(image), drawn.shown
    images = {"before": _webp(_on_white(_reduced(rgb, alpha, _WHOLE)), _WHOLE_QUALITY)}
    if shown.edge is not None and alpha.shape == (shown.height, shown.width):
        left, top, width, height = shown.edge
        part = np.s_[top : top + height, left : left + width]
        images["edge_before"] = _webp(_on_white(np.dstack([rgb[part], alpha[part]])), _EDGE_QUALITY)
    thumb = _faded(_on_white(_reduced(rgb, alpha, _THUMB)), drawn.thumb)
    return Drawn(dataclasses.replace(shown, images={**shown.images, **images}), thumb)


def _faded(source: Pixels, cutout: Pixels | None) -> Pixels:
    """(h, w, 4): what was removed is still to be guessed at, so that an empty cutout is told from another."""
    if cutout is None or cutout.shape[:2] != source.shape[:2]:
        return np.dstack([source, np.full(source.shape[:2], 255, np.uint8)])
    left = np.rint(255 * _REMOVED + (1 - _REMOVED) * cutout[..., 3]).astype(np.uint8)
    return np.dstack([source, left])


def _alpha_of(image: DecodedImage) -> Pixels:
    return np.full(image.rgb.shape[:2], 255, np.uint8) if image.alpha is None else image.alpha


def _reduced(rgb: Pixels, alpha: Pixels, side: int) -> Pixels:
    """(h, w, 4) of at most `side`, straight; averaged with alpha multiplied in, so that no hidden colour shows."""
    height, width = alpha.shape
    scale = max(1.0, max(alpha.shape) / side)
    size = (max(1, round(width / scale)), max(1, round(height / scale)))
    if scale > 4:  # averaging whole areas of a large image takes ten times as long
        twice = (2 * size[0], 2 * size[1])
        rgb = np.asarray(cv2.resize(rgb, twice, interpolation=cv2.INTER_LINEAR), np.uint8)
        alpha = np.asarray(cv2.resize(alpha, twice, interpolation=cv2.INTER_LINEAR), np.uint8)
    share = cv2.cvtColor(alpha, cv2.COLOR_GRAY2RGB).astype(np.float32) / 255
    mixed = cv2.resize(rgb * share, size, interpolation=cv2.INTER_AREA)
    total = np.atleast_3d(cv2.resize(share[..., 0], size, interpolation=cv2.INTER_AREA))
    straight = np.divide(mixed, total, out=np.zeros_like(mixed), where=total > 0)
    return np.asarray(np.rint(np.dstack([straight, total * 255])).clip(0, 255), np.uint8)


def _on_white(rgba: Pixels) -> Pixels:
    share = rgba[..., 3:].astype(np.float32) / 255
    return np.asarray(np.rint(rgba[..., :3] * share + 255 * (1 - share)), np.uint8)


def _webp(pixels: Pixels, quality: int) -> str:
    """`pixels`: (H, W, 3), or (H, W, 4). As base64."""
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(out, "WEBP", quality=quality, method=2)
    return base64.b64encode(out.getvalue()).decode()
