"""Quality figures of masks with a known ground truth and their IoU, and which of them the default thresholds flag.

    python -m tests.bench.quality PHOTOS [--model NAME] [--rows]

PHOTOS contains manifest.csv with the columns image and mask, and the files that it names. `--rows` prints a line per
image.
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
from workers.models.batcher import Batcher

GOOD = 0.8
"""A mask is good from this IoU at 0.5 on."""


@dataclasses.dataclass(frozen=True)
class Measured:
    name: str
    iou: float
    figures: Mapping[str, float]
    review: tuple[str, ...]

    @property
    def group(self) -> str:
        return self.name.split("_")[0]


def measure(photos: Path, model: str) -> Iterator[Measured]:
    with Batcher(load(model), batch_limit=1) as batcher, (photos / "manifest.csv").open() as rows:
        for row in csv.DictReader(rows):
            outputs = cut_out((photos / row["image"]).read_bytes(), Recipe(edges="off"), batcher, limits=Limits())
            mask = np.asarray(Image.open(io.BytesIO(outputs.mask))) >= 128
            truth = np.asarray(Image.open(photos / row["mask"]).convert("L")) >= 128
            iou = (mask & truth).sum() / max(1, (mask | truth).sum())
            yield Measured(row["image"], float(iou), outputs.quality, outputs.review)


def table(masks: Sequence[Measured]) -> str:
    rows = [
        "| photographs | mean IoU | subject | uncertain, median | edge width, median | flagged | why |",
        "|---|---|---|---|---|---|---|",
    ]
    good = [mask for mask in masks if mask.iou >= GOOD]
    bad = [mask for mask in masks if mask.iou < GOOD]
    groups = {name: [mask for mask in masks if mask.group == name] for name in sorted({mask.group for mask in masks})}
    for name, group in {**groups, "all": masks, f"IoU >= {GOOD}": good, f"IoU < {GOOD}": bad}.items():
        reasons = [reason for mask in group for reason in mask.review]
        why = ", ".join(f"{reasons.count(reason)} {reason}" for reason in sorted(set(reasons)))
        rows.append(
            f"| {name}: {len(group)} | {statistics.mean(mask.iou for mask in group):.3f} "
            f"| {_median(group, 'subject_share'):.0%} | {_median(group, 'uncertain_share'):.0%} "
            f"| {_median(group, 'edge_width_px'):.1f} px | {sum(bool(mask.review) for mask in group)} | {why} |"
        )
    return "\n".join(rows)


def _median(masks: Sequence[Measured], figure: str) -> float:
    return statistics.median(mask.figures[figure] for mask in masks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--model", default="u2netp")
    parser.add_argument("--rows", action="store_true")
    options = parser.parse_args()
    masks = sorted(measure(options.photos, options.model), key=lambda mask: mask.iou)
    if options.rows:
        for mask in masks:
            figures = " ".join(f"{name}={value:g}" for name, value in mask.figures.items())
            print(f"{mask.iou:.3f} {mask.name} {figures} {','.join(mask.review)}")
    print(table(masks))


if __name__ == "__main__":
    main()
