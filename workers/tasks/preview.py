"""`JobKind.PREVIEW`: small pictures of one image for the review page: source and cutout reduced, and both at full size
around the worst edge. They are made from S3 when a person reviews a job; a cut job spends nothing on them.
"""

from __future__ import annotations

import base64
import dataclasses
import io

import cv2
import numpy as np
from PIL import Image

from jobs.errors import ImageError
from jobs.job import ImageState
from jobs.preview import Preview
from workers.imaging.decode import DecodedImage
from workers.imaging.pixels import Pixels
from workers.imaging.quality import find_worst_edge
from workers.tasks.attempt import Attempt
from workers.tasks.publish import Existing, Result, Target, find_existing
from workers.tasks.rerender import alpha_of, cutout_limits, fetch_cutout

_WHOLE_PX, _THUMB_PX, _EDGE_PX = 640, 160, 360
"""Longest side of the whole image and of its thumbnail; side of the square around the worst edge."""
_REMOVED_SHARE = 0.25
"""Opacity of removed pixels in a thumbnail."""
_WHOLE_QUALITY, _EDGE_QUALITY = 75, 90
"""Of WebP, whose alpha is exact. At 90 the colour of soft pixels, on black and on white, is 1.6 grey levels off (11
photographs of hair and fur), for a third of the bytes of lossless."""


@dataclasses.dataclass(frozen=True)
class DrawnPreview:
    """A preview whose thumbnail is not encoded yet. `thumb`: (h, w, 4)."""

    preview: Preview
    thumb: Pixels | None = None

    def encode(self) -> Preview:
        thumb = {} if self.thumb is None else {"thumb": _webp(self.thumb, _WHOLE_QUALITY)}
        return dataclasses.replace(self.preview, images={**self.preview.images, **thumb})


def write_preview(attempt: Attempt) -> Result:
    """Write the preview; its `notes` name what can't be shown, and why: a person reviews failed images too."""
    preview = _make_preview(attempt)
    location = attempt.job.preview_path(attempt.task.key)
    attempt.worker.store.put(location, preview.to_json().encode(), content_type="application/json")
    return Result(ImageState.DONE)


def _make_preview(attempt: Attempt) -> Preview:
    """Raises errors that a retry can help."""
    drawn, notes = DrawnPreview(Preview(etag=attempt.task.etag)), []
    try:
        drawn = _show_cutout(attempt) or drawn
    except ImageError as exc:
        notes.append(f"cutout: {exc} [{exc.code}]")
    try:
        drawn = _show_source(attempt, drawn)
    except ImageError as exc:
        notes.append(f"source: {exc} [{exc.code}]")
    return dataclasses.replace(drawn.encode(), notes=tuple(notes))


def _show_cutout(attempt: Attempt) -> DrawnPreview | None:
    """Return None if there is no cutout."""
    worker, context = attempt.worker, attempt.context
    target = Target.of(attempt.job, attempt.task.key)
    existing = find_existing(target, worker.store)
    if existing.cutout is None:
        return None
    preview = _describe(existing, attempt.task.key)
    data = fetch_cutout(existing.cutout, target, worker.store, worker.limits)
    with context.reserve_memory(data), context.computing():
        image = context.decode(data, limits=cutout_limits(worker.limits), animation="first")
        return draw_cutout(image, preview)


def _describe(existing: Existing, key: str) -> Preview:
    metadata, note = existing.cutout.metadata if existing.cutout else {}, existing.note(key)
    return Preview(
        etag=metadata.get("cf-source-etag", ""),
        model=metadata.get("cf-model", ""),
        job=metadata.get("cf-job", ""),
        figures=note.figures,
        review=note.review,
        complaints=tuple(note.unmet_rules()),
    )


def draw_cutout(image: DecodedImage, preview: Preview) -> DrawnPreview:
    """Add pictures of the cutout to `preview`."""
    rgb, alpha = image.rgb, alpha_of(image)
    rows, columns = find_worst_edge(alpha, _EDGE_PX)
    preview = dataclasses.replace(
        preview,
        width=alpha.shape[1],
        height=alpha.shape[0],
        edge=(columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start),
        images={
            "after": _webp(_reduced(rgb, alpha, _WHOLE_PX), _WHOLE_QUALITY),
            "edge_after": _webp(np.dstack([rgb[rows, columns], alpha[rows, columns]]), _EDGE_QUALITY),
        },
    )
    return DrawnPreview(preview, _reduced(rgb, alpha, _THUMB_PX))


def _show_source(attempt: Attempt, drawn: DrawnPreview) -> DrawnPreview:
    """Add the version of the source that the cutout was made from."""
    worker, context = attempt.worker, attempt.context
    data, _ = worker.store.get(
        attempt.paths.source, role="source", etag=drawn.preview.etag, max_bytes=worker.limits.max_bytes
    )
    with context.reserve_memory(data), context.computing():
        return draw_source(context.decode(data, limits=worker.limits, animation="first"), drawn)


def draw_source(image: DecodedImage, drawn: DrawnPreview) -> DrawnPreview:
    """Add pictures of the source to those of its cutout; transparent pixels become white."""
    rgb, alpha, preview = image.rgb, alpha_of(image), drawn.preview
    images = {"before": _webp(_on_white(_reduced(rgb, alpha, _WHOLE_PX)), _WHOLE_QUALITY)}
    if preview.edge is not None and alpha.shape == (preview.height, preview.width):
        left, top, width, height = preview.edge
        part = np.s_[top : top + height, left : left + width]
        images["edge_before"] = _webp(_on_white(np.dstack([rgb[part], alpha[part]])), _EDGE_QUALITY)
    thumb = _faded(_on_white(_reduced(rgb, alpha, _THUMB_PX)), drawn.thumb)
    return DrawnPreview(dataclasses.replace(preview, images={**preview.images, **images}), thumb)


def _faded(source: Pixels, cutout: Pixels | None) -> Pixels:
    """Return (h, w, 4): removed pixels stay faintly visible, so that empty cutouts of two images differ."""
    if cutout is None or cutout.shape[:2] != source.shape[:2]:
        return np.dstack([source, np.full(source.shape[:2], 255, np.uint8)])
    opacity = np.rint(255 * _REMOVED_SHARE + (1 - _REMOVED_SHARE) * cutout[..., 3]).astype(np.uint8)
    return np.dstack([source, opacity])


def _reduced(rgb: Pixels, alpha: Pixels, side: int) -> Pixels:
    """Return (h, w, 4) of at most `side`, straight alpha; averaged premultiplied, so that no hidden colour shows."""
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
    """Encode (H, W, 3) or (H, W, 4) as base64."""
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(out, "WEBP", quality=quality, method=2)
    return base64.b64encode(out.getvalue()).decode()
