"""The dashboard's panels, drawn from what Prometheus recorded of a load on this machine: u2netp on its processor.

pip install matplotlib
python -m tests.bench.panels [--images N] [--out infra/monitoring/dashboard.png]
"""

from __future__ import annotations

import argparse
import io
import math
import re
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from producer.demo.local_stack import LocalStack
from tests.bench.report import progress
from tests.support.loaded_stack import Line, ask_panels, watched
from tests.support.prometheus import DASHBOARD, MONITORING

Answers = Mapping[tuple[str, str], Sequence[Line]]
COLUMNS = 24
CELL_IN, ROW_IN = 0.5, 0.24
"""A cell of Grafana's grid, across and down."""
GAP_S = 3.0
UNITS = {"short": (1, ""), "none": (1, ""), "ops": (1, "/s"), "s": (1, " s"), "bytes": (2**20, " MiB")}
SETTINGS = {"lease_s": "10", "retry_base_s": "1", "log_format": "json"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300, help="of the backfill; a quarter as many are live")
    parser.add_argument("--out", type=Path, default=MONITORING / "dashboard.png")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cutfleet-panels-") as folder:
        answers = measure(Path(folder), options.images)
    draw(answers, options.out)


def measure(folder: Path, images: int) -> Answers:
    with LocalStack(folder / "stack") as stack, watched(stack, folder, workers=2) as load:
        progress(f"{images} images and their faults ...")
        since = load.run(
            images,
            model="u2netp",
            start_dispatcher=lambda **settings: stack.start_dispatcher(**SETTINGS, **settings).pid,
            start_worker=lambda **settings: (
                stack.start_worker(device="cpu", slots="8", batch_limit="4", **SETTINGS, **settings).pid
            ),
        )
        return ask_panels(load.prometheus, since=since, window="20s")


def draw(answers: Answers, out: Path) -> None:
    """As Grafana lays them out, in cells of a grid."""
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in DASHBOARD["panels"])
    plt.rcParams |= {"font.size": 7, "axes.titlesize": 8, "axes.titleweight": "bold", "axes.titlelocation": "left"}
    figure = plt.figure(figsize=(COLUMNS * CELL_IN, rows * ROW_IN))
    end_s = max(at for lines in answers.values() for line in lines for at, _ in line.points)
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        left, right, top, bottom = 0.9 / COLUMNS, 0.2 / COLUMNS, 0.9 / rows, 1.1 / rows
        axes = figure.add_axes(
            (
                at["x"] / COLUMNS + left,
                1 - (at["y"] + at["h"]) / rows + bottom,
                at["w"] / COLUMNS - left - right,
                at["h"] / rows - top - bottom,
            )
        )
        axes.set_title(panel["title"])
        axes.set_xlim(0, end_s)
        DRAW[panel["type"]](axes, panel, _lines(answers, panel))
    plot = io.BytesIO()
    figure.savefig(plot, dpi=90)
    Image.open(plot).convert("RGB").quantize(128).save(out, optimize=True)
    progress(f"{out}: {out.stat().st_size / 1000:.0f} kB")


def _lines(answers: Answers, panel: Any) -> list[tuple[str, Line]]:
    asked = [lines for (title, _), lines in answers.items() if title == panel["title"]]
    return [
        (_name(target["legendFormat"], line), line)
        for target, lines in zip(panel["targets"], asked, strict=True)
        for line in lines
        if line.points
    ]


def _stat(axes: Axes, panel: Any, lines: list[tuple[str, Line]]) -> None:
    """The mean of the run; at its end most are 0."""
    axes.set_axis_off()
    (_, line), *_ = lines
    size, unit = _unit(panel)
    axes.fill_between(*_plotted(line, size), alpha=0.25)
    mean = statistics.fmean(value for _, value in line.points)
    axes.text(0.5, 0.5, f"{mean / size:,.3g}{unit}", transform=axes.transAxes, ha="center", va="center", fontsize=14)


def _series(axes: Axes, panel: Any, lines: list[tuple[str, Line]]) -> None:
    size, unit = _unit(panel)
    for name, line in lines:
        is_flat = not any(value for _, value in line.points)
        axes.plot(*_plotted(line, size), label=f"_{name}" if is_flat else name, linewidth=1)
    axes.grid(alpha=0.3)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(unit.strip())
    if lines:
        axes.legend(loc="upper right", framealpha=0.7, fontsize=6, ncols=2 if len(lines) > 4 else 1)
    else:
        axes.text(0.5, 0.5, "no GPU on this machine", transform=axes.transAxes, ha="center")


def _table(axes: Axes, panel: Any, lines: list[tuple[str, Line]]) -> None:
    axes.set_axis_off()
    names = ["instance", "model", "device", "dtype", "revision", "version"]
    cells = [[line.labels.get(name, "")[:16] for name in names] for _, line in lines]
    axes.table(cells, colLabels=names, loc="upper center", cellLoc="left", edges="horizontal")


DRAW = {"stat": _stat, "timeseries": _series, "table": _table}


def _plotted(line: Line, size: float) -> tuple[list[float], list[float]]:
    """Times and values; where Prometheus had no figure, the line ends and begins anew."""
    times, values, before = [], [], line.points[0][0]
    for at, value in line.points:
        if at - before > GAP_S:
            times.append(before)
            values.append(math.nan)
        times.append(at)
        values.append(value / size)
        before = at
    return times, values


def _name(legend: str, line: Line) -> str:
    labels = line.labels | {"instance": ":" + line.labels.get("instance", "").rpartition(":")[2]}
    return re.sub(r"{{(\w+)}}", lambda found: labels.get(found[1], ""), legend)


def _unit(panel: Any) -> tuple[float, str]:
    unit = panel["fieldConfig"]["defaults"].get("unit", "short")
    return (0.01, " %") if unit == "percentunit" else UNITS[unit]


if __name__ == "__main__":
    main()
