"""Images per second and memory on a CUDA device: batch 1 to 16, eager and compiled, in each precision:

    python -m tests.gpu.models [--model birefnet ...] [--no-compile]

The weights are random: time does not depend on them.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time

import torch
from torch import Tensor, nn

from jobs.catalogue import PRESETS, Preset
from tests.bench.models import build, count_flop
from workers.models.batcher import PADDED_SIZES
from workers.models.device import DTYPES, describe_device, place, resolve_device

SECONDS = 3.0
"""Shortest time of each measurement: the GPU clocks must settle."""


@dataclasses.dataclass(frozen=True)
class Cell:
    batch: int
    dtype: torch.dtype
    compiled: bool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", action="append", choices=PRESETS, help="default: birefnet")
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("This needs a CUDA device; tests/bench/models.py measures on a CPU.", file=sys.stderr)
        return 2
    device = resolve_device("cuda")
    print(f"{describe_device(device)}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    print(f"{'model':16} {'dtype':>9} {'mode':>9} {'batch':>6} {'ms/batch':>9} {'img/s':>8} {'TFLOP/s':>8} {'GiB':>6}")
    modes = (False,) if arguments.no_compile else (False, True)
    for name in arguments.model or ["birefnet"]:
        for compiled, dtype, batch in itertools.product(modes, DTYPES.values(), PADDED_SIZES):
            print(describe(PRESETS[name], Cell(batch, dtype, compiled), device), flush=True)
    return 0


def describe(preset: Preset, cell: Cell, device: torch.device) -> str:
    dtype, mode = str(cell.dtype).removeprefix("torch."), "compiled" if cell.compiled else "eager"
    head = f"{preset.name:16} {dtype:>9} {mode:>9} {cell.batch:6}"
    try:
        seconds, peak = measure(preset, cell, device)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return f"{head} {'out of memory':>9}"
    rate = cell.batch / seconds
    tflop = count_flop(preset, preset.input_size) * rate / 1e12
    return f"{head} {seconds * 1e3:9.1f} {rate:8.1f} {tflop:8.1f} {peak / 2**30:6.1f}"


@torch.inference_mode()
def measure(preset: Preset, cell: Cell, device: torch.device) -> tuple[float, int]:
    """Return seconds per batch, including the copies to and from the device, and the peak memory in bytes."""
    torch.cuda.reset_peak_memory_stats(device)
    network = place(build(preset), device, cell.dtype)
    if cell.compiled:
        network.compile(dynamic=False)
    rgb = torch.randint(0, 256, (cell.batch, *preset.input_size, 3), dtype=torch.uint8).pin_memory()
    for _ in range(3):
        predict(network, rgb, cell.dtype, device)
    torch.cuda.synchronize(device)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS:
        predict(network, rgb, cell.dtype, device)
        count += 1
    return (time.perf_counter() - started) / count, torch.cuda.max_memory_allocated(device)


def predict(network: nn.Module, rgb: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Do what the batcher does with a batch."""
    x = rgb.to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 127.5 - 1
    alpha: Tensor = network(x.to(dtype)).float().sigmoid()
    return (alpha * 255).round().to(torch.uint8).cpu()


if __name__ == "__main__":
    sys.exit(main())
