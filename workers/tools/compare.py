"""Compare models on the images in a folder. For images with a true mask (`NAME.mask.png` beside `NAME.jpg`) prints a
table of measures, overall and by subfolder. For images without one writes a collage of those where the models differ
most.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from jobs.errors import ImageError, ModelError, SettingsError
from jobs.settings import load_settings
from workers.imaging.decode import Limits, decode_image
from workers.imaging.pixels import Pixels
from workers.imaging.resize import enlarge, shrink
from workers.models import LoadedModel, load
from workers.models.batcher import Batcher

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".heic", ".avif")
TRUTH_SUFFIX = ".mask.png"
THUMB = 192
"""Longest side of an image in the collage, in pixels."""
COLLAGE_ROWS = 12
MEASURES = ("MAE", "IoU", "F", "S", "E")
"""MAE is better the lower, the others the higher; all in [0, 1]."""
MARGIN = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One model's result on one image. `measures`: by name of `MEASURES`, empty without a true mask. `thumb`,
    `thumb_mask`: image and mask, at most `THUMB` on a side.
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
    """Run each model on every image below `folder`; one model is in memory at a time. `report` receives a line for each
    image that can't be decoded, once for all models. Raises `SettingsError` if there is no image, and `ModelError`.
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
        results += _run(name, images, load_model(name), report if number == 0 else lambda text: None)
    return results


def _run(name: str, images: list[Path], model: LoadedModel, report: Callable[[str], None]) -> list[Result]:
    results = []
    with Batcher(model, batch_limit=1) as batcher:
        batcher.warm_up()
        for path in images:
            try:
                rgb = decode_image(path.read_bytes(), limits=Limits(), animation="first").rgb
            except ImageError as exc:
                report(f"{path} is skipped: {exc}")
                continue
            started = time.perf_counter()
            mask = enlarge(batcher.predict(shrink(rgb, model.input_size)), rgb.shape[:2])
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
    """Compute the measures of salient object detection with pysodmetrics, F and E at its adaptive threshold, and IoU at
    0.5. Both (H, W). The mask is not stretched to the full range first: a faint mask is a bad mask.
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
    """Return a table of means, overall and by subfolder; without true masks, only seconds per image."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        inside = result.image.parent.relative_to(folder).as_posix()
        for group in {"all", inside} - {"."}:
            groups.setdefault((group, result.model), []).append(result)
    lines = [f"{'folder':24} {'model':24} {'images':>8} {'measured':>8}", ""]
    lines[0] += "".join(f"{name:>8}" for name in MEASURES) + f"{'s/image':>11}"
    for (group, model), members in sorted(groups.items(), key=lambda item: (item[0][0] != "all", item[0])):
        measured = [member.measures for member in members if member.measures]
        means = [f"{np.mean([row[name] for row in measured]):8.4f}" if measured else f"{'-':>8}" for name in MEASURES]
        seconds = np.mean([member.seconds for member in members])
        lines.append(f"{group:24} {model:24} {len(members):8} {len(measured):8}{''.join(means)}{seconds:11.3f}")
    return "\n".join(lines)


def draw_differences(results: Sequence[Result]) -> Pixels:
    """Draw the images whose masks differ most, the largest difference first; a row is the image and its cutouts.
    Returns (H, W, 3).
    """
    rows: dict[Path, list[Result]] = {}
    for result in results:
        rows.setdefault(result.image, []).append(result)
    worst = sorted(rows.values(), key=_max_difference, reverse=True)[:COLLAGE_ROWS]
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
    """Print the table. Exit code 2, with a sentence on stderr, if a setting or a model must change."""
    parser = argparse.ArgumentParser("python -m workers compare", description=__doc__)
    parser.add_argument("--model", action="append", required=True, help="preset or path; repeat it for each model")
    parser.add_argument("--collage", type=Path, default=Path("comparison.png"), help="file to write the collage to")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args(argv)
    try:
        settings = load_settings()
        load_model = functools.partial(
            load,
            device=settings.device,
            dtype=settings.dtype,
            accept_licence=settings.accept_licence,
            trust_remote_code=settings.trust_remote_code,
            revision=settings.model_revision,
        )
        results = compare(arguments.model, arguments.folder, load_model=load_model, report=_report)
    except SettingsError as exc:
        _report(f"{exc} [{exc.code}]")
        return 2
    if not results:
        _report(f"No image in {arguments.folder} can be decoded.")
        return 2
    print(format_table(results, arguments.folder))
    if not all(result.measures for result in results) and len(arguments.model) > 1:
        cv2.imwrite(str(arguments.collage), cv2.cvtColor(draw_differences(results), cv2.COLOR_RGB2BGR))
        _report(f"Largest differences (columns: {', '.join(arguments.model)}): {arguments.collage}")
    return 0


def _report(text: str) -> None:
    print(text, file=sys.stderr)


def _read_truth(image: Path, size: tuple[int, ...]) -> Pixels | None:
    """Read the true mask beside `image`, if there is one. Raises `SettingsError` if its size differs."""
    path = image.with_name(image.stem + TRUTH_SUFFIX)
    if not path.is_file():
        return None
    truth = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_GRAYSCALE)
    if truth is None or truth.shape != size:
        raise SettingsError(f"{path} must be an image of {size[1]} x {size[0]} pixels, the size of {image.name}.")
    return np.asarray(truth, np.uint8)


def _max_difference(members: list[Result]) -> float:
    """Return the largest mean difference between any two models' masks, in grey levels."""
    pairs = itertools.combinations((member.thumb_mask.astype(np.int16) for member in members), 2)
    return max((float(np.abs(first - second).mean()) for first, second in pairs), default=0.0)


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
