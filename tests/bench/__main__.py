"""All benchmarks in one table:

    python -m tests.bench [PART ...] [--json FILE] [--markdown FILE] [--keep]

Each part is a module with its own command line; the part `images` is `image_path.py`. `--keep` appends the ratios of
this run to `results.jsonl`. Every run is compared with the runs kept on the same kind of machine: the exit code is 1,
and the ratio is named, if it is more than 10 % below the median of the last five. Only ratios are kept: times vary with
the machine's load.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from producer.demo.local_stack import deferred_signals
from tests.bench.report import TERMINATED, Row, from_json, machine_facts, progress, to_json, to_markdown

PARTS: Mapping[str, Sequence[str]] = {
    "images": ("--rounds", "3"),
    "queue": (),
    "worker": ("--rounds", "2"),
    "processes": ("--rounds", "2"),
    "interpreter": ("--rounds", "2"),
    "inference": ("--rounds", "5"),
    "start": ("--rounds", "3"),
    "memory": ("--minutes", "1"),
}
MODULES = {part: part for part in PARTS} | {"images": "image_path"}
RESULTS = Path(__file__).with_name("results.jsonl")
COMPARED_RUNS = 5
LOSS = 0.9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", metavar="PART", help=f"default: {' '.join(PARTS)}")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--keep", action="store_true", help=f"append the ratios to {RESULTS.name}")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    if unknown := set(options.part) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    started = time.monotonic()
    rows = {part: run(part) for part in options.part or PARTS}
    minutes = (time.monotonic() - started) / 60
    facts = {"commit": _commit(), "at": datetime.now(UTC).isoformat(timespec="minutes"), **machine_facts()}
    text = _page(rows, facts, minutes)
    print(text)
    if options.markdown:
        options.markdown.write_text(text)
    if options.json:
        parts = {part: to_json(found) for part, found in rows.items()}
        options.json.write_text(json.dumps({"machine": facts, "parts": parts}, indent=1))
    ratios = ratios_of(rows)
    losses = find_losses(ratios, earlier_ratios(facts))
    for name, (now, before) in losses.items():
        print(f"LOSS {name}: {now:.2f} times, before {before:.2f}")
    if options.keep:
        with RESULTS.open("a") as file:
            file.write(json.dumps({**facts, "ratios": ratios}) + "\n")
    return 1 if losses else 0


def run(part: str) -> list[Row]:
    """Run a part in its own process, so that threads and memory of other parts do not count."""
    progress(f"{part} ...")
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", f"tests.bench.{MODULES[part]}", *PARTS[part], "--json", file.name]
        with contextlib.ExitStack() as stack:
            with deferred_signals():
                child = stack.enter_context(subprocess.Popen(command, stdout=subprocess.DEVNULL))
                stack.callback(child.terminate)  # Popen waits for it then, and it stops its servers
            code = child.wait()
        if code:
            raise SystemExit(f"{part} ended with {code}")
        return from_json(Path(file.name).read_text())


def ratios_of(rows: Mapping[str, Sequence[Row]]) -> dict[str, float]:
    return {
        f"{part}: {row.name}, against {row.against}": round(row.ratio, 3)
        for part, found in rows.items()
        for row in found
        if row.ratio is not None
    }


def earlier_ratios(facts: Mapping[str, object]) -> list[dict[str, float]]:
    """Return the ratios of the last runs with the same processor and number of cores, oldest first."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    runs = [json.loads(line) for line in lines]
    comparable = [run["ratios"] for run in runs if all(run[name] == facts[name] for name in ("processor", "cores"))]
    return comparable[-COMPARED_RUNS:]


def find_losses(now: Mapping[str, float], before: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """Return ratio and median of the earlier ratios, by name, where more than a tenth is lost."""
    past = {name: [run[name] for run in before if name in run] for name in now}
    medians = {name: statistics.median(values) for name, values in past.items() if values}
    return {name: (now[name], middle) for name, middle in medians.items() if now[name] < LOSS * middle}


def _page(rows: Mapping[str, Sequence[Row]], facts: Mapping[str, object], minutes: float) -> str:
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    tables = [f"## {part}\n\n{to_markdown(found)}" for part, found in rows.items()]
    return "\n\n".join(["# Benchmarks", "\n".join(lines), *tables, f"{minutes:.0f} minutes."]) + "\n"


def _commit() -> str:
    ran = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return ran.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
