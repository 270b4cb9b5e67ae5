"""Draws the dashboard's panels from what Prometheus recorded under load on this machine, with u2netp on the CPU.

pip install matplotlib
python -m tests.bench.panels [--images N] [--out infra/monitoring/dashboard.png]
"""

from __future__ import annotations

import argparse
import io
import math
import re
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from producer.demo.local_stack import LocalStack
from tests.bench.report import progress
from tests.support.loaded_stack import Series, monitored_load, query_panels
from tests.support.prometheus import DASHBOARD, MONITORING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Answers = Mapping[tuple[str, str], Sequence[Series]]
COLUMNS = 24
CELL_IN, ROW_IN = 0.5, 0.24
"""Width and height of a cell of Grafana's grid in inches."""
GAP_S = 3.0
UNITS = {"short": (1, ""), "none": (1, ""), "ops": (1, "/s"), "s": (1, " s"), "bytes": (2**20, " MiB")}
SETTINGS = {"lease_s": "10", "retry_base_s": "1", "log_format": "json"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300, help="images of the backfill; a quarter as many are live")
    parser.add_argument("--out", type=Path, default=MONITORING / "dashboard.png")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cutfleet-panels-") as folder:
        answers = measure(Path(folder), options.images)
    draw(answers, options.out)


def measure(folder: Path, images: int) -> Answers:
    with LocalStack(folder / "stack") as stack, monitored_load(stack, folder, workers=2) as load:
        progress(f"{images} images and their faults ...")
        since = load.run(
            images,
            model="u2netp",
            start_dispatcher=lambda **settings: stack.start_dispatcher(**SETTINGS, **settings).pid,
            start_worker=lambda **settings: (
                stack.start_worker(device="cpu", slots="8", batch_limit="4", **SETTINGS, **settings).pid
            ),
        )
        return query_panels(load.prometheus, since=since, window="20s")


def draw(answers: Answers, out: Path) -> None:
    """Draw the panels in Grafana's layout."""
    import matplotlib.pyplot as plt

    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in DASHBOARD["panels"])
    plt.rcParams |= {"font.size": 7, "axes.titlesize": 8, "axes.titleweight": "bold", "axes.titlelocation": "left"}
    figure = plt.figure(figsize=(COLUMNS * CELL_IN, rows * ROW_IN))
    end_s = max(at for found in answers.values() for series in found for at, _ in series.points)
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
        DRAW[panel["type"]](axes, panel, _panel_series(answers, panel))
    plot = io.BytesIO()
    figure.savefig(plot, dpi=90)
    Image.open(plot).convert("RGB").quantize(128).save(out, optimize=True)
    progress(f"{out}: {out.stat().st_size / 1000:.0f} kB")


def _panel_series(answers: Answers, panel: Any) -> list[tuple[str, Series]]:
    answered = [found for (title, _), found in answers.items() if title == panel["title"]]
    return [
        (_name(target["legendFormat"], series), series)
        for target, found in zip(panel["targets"], answered, strict=True)
        for series in found
        if series.points
    ]


def _stat(axes: Axes, panel: Any, shown: list[tuple[str, Series]]) -> None:
    """Show the mean of the run: at its end most values are 0."""
    axes.set_axis_off()
    (_, series), *_ = shown
    size, unit = _unit(panel)
    axes.fill_between(*_plotted(series, size), alpha=0.25)
    mean = statistics.fmean(value for _, value in series.points)
    axes.text(0.5, 0.5, f"{mean / size:,.3g}{unit}", transform=axes.transAxes, ha="center", va="center", fontsize=14)


def _timeseries(axes: Axes, panel: Any, shown: list[tuple[str, Series]]) -> None:
    size, unit = _unit(panel)
    for name, series in shown:
        is_flat = not any(value for _, value in series.points)
        axes.plot(*_plotted(series, size), label=f"_{name}" if is_flat else name, linewidth=1)
    axes.grid(alpha=0.3)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(unit.strip())
    if shown:
        axes.legend(loc="upper right", framealpha=0.7, fontsize=6, ncols=2 if len(shown) > 4 else 1)
    else:
        axes.text(0.5, 0.5, "no GPU on this machine", transform=axes.transAxes, ha="center")


def _table(axes: Axes, panel: Any, shown: list[tuple[str, Series]]) -> None:
    axes.set_axis_off()
    names = ["instance", "model", "device", "dtype", "revision", "version"]
    cells = [[series.labels.get(name, "")[:16] for name in names] for _, series in shown]
    axes.table(cells, colLabels=names, loc="upper center", cellLoc="left", edges="horizontal")


DRAW = {"stat": _stat, "timeseries": _timeseries, "table": _table}


def _plotted(series: Series, size: float) -> tuple[list[float], list[float]]:
    """Return times and values, with a gap where Prometheus has no value."""
    times: list[float] = []
    values: list[float] = []
    before = series.points[0][0]
    for at, value in series.points:
        if at - before > GAP_S:
            times.append(before)
            values.append(math.nan)
        times.append(at)
        values.append(value / size)
        before = at
    return times, values


def _name(legend: str, series: Series) -> str:
    labels = series.labels | {"instance": ":" + series.labels.get("instance", "").rpartition(":")[2]}
    return re.sub(r"{{(\w+)}}", lambda found: labels.get(found[1], ""), legend)


def _unit(panel: Any) -> tuple[float, str]:
    unit = panel["fieldConfig"]["defaults"].get("unit", "short")
    return (0.01, " %") if unit == "percentunit" else UNITS[unit]


if __name__ == "__main__":
    main()
