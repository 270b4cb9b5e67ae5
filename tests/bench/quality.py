"""What the quality figures say of masks whose truth is known, beside their IoU; and whom the default thresholds flag.

    python -m tests.bench.quality PHOTOS [--model NAME] [--rows]

PHOTOS holds manifest.csv with columns image and mask, and the files that it names. `--rows` prints a line an image.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from jobs.recipe import Recipe
from workers.imaging.decode import Limits
from workers.imaging.pipeline import cut_out
from workers.models import load
from workers.models.batcher import Predictor

GOOD = 0.8
"""IoU at 0.5 from which on a mask is called good."""


@dataclasses.dataclass(frozen=True)
class Line:
    name: str
    iou: float
    figures: Mapping[str, float]
    review: tuple[str, ...]

    @property
    def group(self) -> str:
        return self.name.split("_")[0]


def measure(photos: Path, model: str) -> Iterator[Line]:
    with Predictor(load(model), batch_limit=1) as predictor, (photos / "manifest.csv").open() as rows:
        for row in csv.DictReader(rows):
            outputs = cut_out((photos / row["image"]).read_bytes(), Recipe(edges="off"), predictor, limits=Limits())
            mask = np.asarray(Image.open(io.BytesIO(outputs.mask))) >= 128
            truth = np.asarray(Image.open(photos / row["mask"]).convert("L")) >= 128
            iou = (mask & truth).sum() / max(1, (mask | truth).sum())
            yield Line(row["image"], float(iou), outputs.quality, outputs.review)


def table(lines: Sequence[Line]) -> str:
    rows = [
        "| photographs | mean IoU | subject | uncertain, median | edge width, median | flagged | why |",
        "|---|---|---|---|---|---|---|",
    ]
    good = [line for line in lines if line.iou >= GOOD]
    bad = [line for line in lines if line.iou < GOOD]
    groups = {name: [line for line in lines if line.group == name] for name in sorted({line.group for line in lines})}
    for name, group in {**groups, "all": lines, f"IoU >= {GOOD}": good, f"IoU < {GOOD}": bad}.items():
        reasons = [reason for line in group for reason in line.review]
        why = ", ".join(f"{reasons.count(reason)} {reason}" for reason in sorted(set(reasons)))
        rows.append(
            f"| {name}: {len(group)} | {statistics.mean(line.iou for line in group):.3f} "
            f"| {_median(group, 'subject_share'):.0%} | {_median(group, 'uncertain_share'):.0%} "
            f"| {_median(group, 'edge_width_px'):.1f} px | {sum(bool(line.review) for line in group)} | {why} |"
        )
    return "\n".join(rows)


def _median(lines: Sequence[Line], figure: str) -> float:
    return statistics.median(line.figures[figure] for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--model", default="u2netp")
    parser.add_argument("--rows", action="store_true")
    options = parser.parse_args()
    lines = sorted(measure(options.photos, options.model), key=lambda line: line.iou)
    if options.rows:
        for line in lines:
            figures = " ".join(f"{name}={value:g}" for name, value in line.figures.items())
            print(f"{line.iou:.3f} {line.name} {figures} {','.join(line.review)}")
    print(table(lines))


if __name__ == "__main__":
    main()
