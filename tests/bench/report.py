"""Results of benchmarks: rows with a median, its quartiles, and the ratio to something measured in the same run. Only
ratios can be compared between machines and days.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import signal
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

TERMINATED = 143
"""A shell's exit code for SIGTERM."""
_LIBRARIES = ("torch", "numpy", "pillow", "opencv-python-headless", "simplejpeg", "isal", "celery", "boto3", "redis")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """`value`: median in `unit`, with the quartiles `low` and `high`. `other`: median of what `against` names.
    `better`: whether less or more is better."""

    name: str
    value: float
    unit: str
    low: float
    high: float
    against: str = ""
    other: float | None = None
    better: Literal["less", "more"] = "less"

    @property
    def ratio(self) -> float | None:
        """How many times better than the other; None without another."""
        if self.other is None:
            return None
        return self.other / self.value if self.better == "less" else self.value / self.other


def row(
    name: str,
    values: Sequence[float],
    unit: str,
    *,
    against: str = "",
    others: Sequence[float] = (),
    better: Literal["less", "more"] = "less",
) -> Row:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    other = statistics.median(others) if others else None
    return Row(name=name, value=middle, unit=unit, low=low, high=high, against=against, other=other, better=better)


def fact(name: str, value: float, unit: str) -> Row:
    """Return a row of a single value."""
    return Row(name=name, value=value, unit=unit, low=value, high=value)


def to_markdown(rows: Iterable[Row]) -> str:
    lines = ["| what | median (quartiles) | unit | against | its median | times better |", "|---|---|---|---|---|---|"]
    for row in rows:
        spread = "" if row.low == row.high else f" ({_number(row.low)} to {_number(row.high)})"
        other = "" if row.other is None else _number(row.other)
        ratio = "" if row.ratio is None else f"**{_number(row.ratio)}**"
        lines.append(f"| {row.name} | {_number(row.value)}{spread} | {row.unit} | {row.against} | {other} | {ratio} |")
    return "\n".join(lines)


def to_json(rows: Iterable[Row]) -> list[dict[str, object]]:
    return [dataclasses.asdict(row) | {"ratio": row.ratio} for row in rows]


def from_json(text: str) -> list[Row]:
    return [Row(**{name: value for name, value in fields.items() if name != "ratio"}) for fields in json.loads(text)]


def machine_facts() -> dict[str, str | int]:
    processor = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    memory_kb = next(int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal"))
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_kb / 2**20),
        "python": platform.python_version(),
        "libraries": ", ".join(f"{name} {version(name)}" for name in _LIBRARIES),
    }


def run_benchmark(parser: argparse.ArgumentParser, measure: Callable[[argparse.Namespace], Iterable[Row]]) -> None:
    """Run a benchmark's command line: print the table; `--json FILE` also writes the rows. SIGTERM raises `SystemExit`,
    so that the benchmark stops what it started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    rows = list(measure(options))
    print(to_markdown(rows))
    if options.json:
        options.json.write_text(json.dumps(to_json(rows), indent=1))


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _number(value: float) -> str:
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
