"""`python -m workers compare --model A --model B FOLDER`: models side by side on one's own images. With true masks
beside them (`NAME.mask.png` for `NAME.jpg`) a table of measures, overall and by subfolder; without, a collage of the
images where the models disagree most.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from jobs.errors import ImageError, ModelError, SettingsError
from workers.imaging.decode import Limits, decode_image
from workers.imaging.resize import enlarge, shrink
from workers.models import LoadedModel, load
from workers.models.batcher import Predictor

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".heic", ".avif")
TRUTH_SUFFIX = ".mask.png"
THUMB = 192
"""Longest side of what is kept of each image for the collage, in pixels."""
COLLAGE_ROWS = 12
MEASURES = ("MAE", "IoU", "F", "S", "E")
MARGIN = 6

Pixels = NDArray[np.uint8]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One model on one image. `measures`: by name of `MEASURES`, empty without a true mask; MAE is better lower, the
    others higher, all in [0, 1]. `thumb`, `thumb_mask`: the image and its mask, at most `THUMB` on a side.
    """

    model: str
    image: Path
    seconds: float
    measures: dict[str, float]
    thumb: Pixels
    thumb_mask: Pixels


def compare(
    models: Sequence[str],
    folder: Path,
    *,
    load_model: Callable[[str], LoadedModel],
    report: Callable[[str], None],
) -> list[Result]:
    """Runs each model over every image below `folder`, one model in memory at a time. `report` hears of images that
    are left out, which are left out for every model. Raises `SettingsError` if there is no image, `ModelError`.
    """
    images = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.endswith(TRUTH_SUFFIX) and path.is_file()
    )
    if not images:
        raise SettingsError(f"There is no image in {folder} ({', '.join(SUFFIXES)}).")
    results: list[Result] = []
    for number, name in enumerate(models):
        heard = report if number == 0 else lambda text: None
        results += _run(name, images, load_model(name), heard)
    return results


def _run(name: str, images: list[Path], model: LoadedModel, report: Callable[[str], None]) -> list[Result]:
    results = []
    with Predictor(model, batch_limit=1) as predictor:
        predictor.warm_up()
        for path in images:
            try:
                rgb = decode_image(path.read_bytes(), limits=Limits(), animation="first").rgb
            except ImageError as exc:
                report(f"{path} is left out: {exc}")
                continue
            started = time.perf_counter()
            mask = enlarge(predictor.predict(shrink(rgb, model.input_size)), rgb.shape[:2])
            seconds = time.perf_counter() - started
            truth = _read_truth(path, rgb.shape[:2])
            results.append(
                Result(
                    model=name,
                    image=path,
                    seconds=seconds,
                    measures=measure(mask, truth) if truth is not None else {},
                    thumb=_shrink_to_thumb(rgb),
                    thumb_mask=_shrink_to_thumb(mask),
                )
            )
    return results


def measure(mask: Pixels, truth: Pixels) -> dict[str, float]:
    """Both (H, W) uint8. The measures of salient object detection as pysodmetrics computes them, F and E at its
    adaptive threshold; IoU at 0.5. The mask is taken as it is, not stretched to the full range first: a faint mask is a
    bad one.
    """
    sod = _sod_metrics()
    alpha, subject = mask.astype(np.float64) / 255, truth > 127
    adaptive_f = sod.FmeasureHandler(with_dynamic=False, with_adaptive=True)
    mae, f, s, e = sod.MAE(), sod.FmeasureV2({"f": adaptive_f}), sod.Smeasure(), sod.Emeasure()
    for metric in (mae, f, s, e):
        metric.step(alpha, subject, normalize=False)
    union = ((alpha > 0.5) | subject).sum()
    return {
        "MAE": float(mae.get_results()["mae"]),
        "IoU": float(((alpha > 0.5) & subject).sum() / union) if union else 1.0,
        "F": float(f.get_results()["f"]["adaptive"]),
        "S": float(s.get_results()["sm"]),
        "E": float(e.get_results()["em"]["adp"]),
    }


def format_table(results: Sequence[Result], folder: Path) -> str:
    """Means by subfolder and over all; without true masks, seconds an image only."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        inside = result.image.parent.relative_to(folder).as_posix()
        for place in {"all", inside} - {"."}:
            groups.setdefault((place, result.model), []).append(result)
    lines = [f"{'folder':24} {'model':24} {'images':>8} {'measured':>8}", ""]
    lines[0] += "".join(f"{name:>8}" for name in MEASURES) + f"{'s/image':>11}"
    for (place, model), members in sorted(groups.items(), key=lambda item: (item[0][0] != "all", item[0])):
        measured = [member.measures for member in members if member.measures]
        means = [f"{np.mean([one[name] for one in measured]):8.4f}" if measured else f"{'-':>8}" for name in MEASURES]
        seconds = np.mean([member.seconds for member in members])
        lines.append(f"{place:24} {model:24} {len(members):8} {len(measured):8}{''.join(means)}{seconds:11.3f}")
    return "\n".join(lines)


def draw_disagreements(results: Sequence[Result]) -> Pixels:
    """(H, W, 3) uint8: the images where masks differ most, worst first; each row the image, then its cutouts."""
    rows: dict[Path, list[Result]] = {}
    for result in results:
        rows.setdefault(result.image, []).append(result)
    worst = sorted(rows.values(), key=_disagreement, reverse=True)[:COLLAGE_ROWS]
    columns = 1 + max(len(members) for members in worst)
    step = THUMB + MARGIN
    sheet = np.full((MARGIN + step * len(worst), MARGIN + step * columns, 3), 255, np.uint8)
    for row, members in enumerate(worst):
        cells = [members[0].thumb, *(_on_checkerboard(member.thumb, member.thumb_mask) for member in members)]
        for column, cell in enumerate(cells):
            top, left = MARGIN + row * step, MARGIN + column * step
            sheet[top : top + cell.shape[0], left : left + cell.shape[1]] = cell
    return sheet


def main(argv: list[str]) -> int:
    """Prints the table. Exit code 0; 2 with one sentence where a setting or a model must change."""
    from jobs.settings import load_settings

    parser = argparse.ArgumentParser("python -m workers compare", description=__doc__)
    parser.add_argument("--model", action="append", required=True, help="preset or path; give it once a model")
    parser.add_argument("--collage", type=Path, default=Path("comparison.png"), help="where the collage is written")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args(argv)
    try:
        settings = load_settings()

        def load_model(name: str) -> LoadedModel:
            return load(
                name,
                device=settings.device,
                dtype=settings.dtype,
                accept_licence=settings.accept_licence,
                trust_remote_code=settings.trust_remote_code,
                revision=settings.model_revision,
            )

        results = compare(arguments.model, arguments.folder, load_model=load_model, report=_say)
    except SettingsError as exc:
        _say(f"{exc} [{exc.code}]")
        return 2
    if not results:
        _say(f"No image in {arguments.folder} could be read.")
        return 2
    print(format_table(results, arguments.folder))
    if not all(result.measures for result in results) and len(arguments.model) > 1:
        cv2.imwrite(str(arguments.collage), cv2.cvtColor(draw_disagreements(results), cv2.COLOR_RGB2BGR))
        _say(f"Where they disagree most ({', then '.join(arguments.model)}): {arguments.collage}")
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _read_truth(image: Path, size: tuple[int, ...]) -> Pixels | None:
    """The true mask beside `image`. Raises `SettingsError` where it is no image of the same size."""
    path = image.with_name(image.stem + TRUTH_SUFFIX)
    if not path.is_file():
        return None
    truth = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_GRAYSCALE)
    if truth is None or truth.shape != size:
        raise SettingsError(f"{path} is no grey image of {size[1]} x {size[0]}, the size of {image.name}.")
    return np.asarray(truth, np.uint8)


def _disagreement(members: list[Result]) -> float:
    """The largest mean difference between any two models' masks, in grey levels."""
    pairs = itertools.combinations((member.thumb_mask.astype(np.int16) for member in members), 2)
    return max((float(np.abs(one - other).mean()) for one, other in pairs), default=0.0)


def _shrink_to_thumb(pixels: Pixels) -> Pixels:
    height, width = pixels.shape[:2]
    scale = min(1.0, THUMB / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)


def _on_checkerboard(rgb: Pixels, mask: Pixels) -> Pixels:
    rows, columns = np.indices(mask.shape) // 12
    ground = np.where((rows + columns) % 2, 200, 245)[..., None]
    alpha = mask[..., None] / 255
    return (rgb * alpha + ground * (1 - alpha)).round().astype(np.uint8)


def _sod_metrics() -> Any:  # pysodmetrics has no types
    try:
        import py_sod_metrics
    except ImportError as exc:
        raise ModelError(
            "Measuring against true masks needs pysodmetrics: pip install 'cutfleet[compare]'.", code="model_missing"
        ) from exc
    return py_sod_metrics
