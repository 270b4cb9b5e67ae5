"""CPU seconds per image, peak memory and FLOPs of the models in float32:

    python -m tests.bench.models [--model birefnet-lite ...] [--size 1024] [--compile]

The weights are random: time does not depend on them. Each model runs in its own process, which gives its own peak.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torchvision.ops  # noqa: F401  (registers torch.ops.torchvision)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from jobs.catalogue import PRESETS, Preset
from workers.models.birefnet import BiRefNet
from workers.models.device import place
from workers.models.u2net import U2Net

DEFAULT_MODELS = ("u2netp", "birefnet-lite", "birefnet")
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", action="append", choices=PRESETS, help=f"default: {', '.join(DEFAULT_MODELS)}")
    parser.add_argument("--size", type=int, help="side of the input in pixels; default: the preset's")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    models = arguments.model or list(DEFAULT_MODELS)
    if arguments.in_process:
        print(measure(PRESETS[models[0]], arguments.size, compiled=arguments.compile))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, best of {ROUNDS}")
    print(f"{'model':20} {'input':>11} {'TFLOP':>7} {'s/image':>10} {'CPU s':>8} {'first s':>8} {'peak GiB':>9}")
    for name in models:
        options = ["--size", str(arguments.size)] if arguments.size else []
        options += ["--compile"] if arguments.compile else []
        subprocess.run(
            [sys.executable, "-m", "tests.bench.models", "--in-process", "--model", name, *options], check=True
        )


def measure(preset: Preset, side: int | None, *, compiled: bool) -> str:
    size = (side, side) if side else preset.input_size
    flop = count_flop(preset, size)
    network: Callable[..., torch.Tensor] = place(build(preset), torch.device("cpu"), torch.float32)
    if compiled:
        network = torch.compile(network, dynamic=False)
    x = torch.randn(1, 3, *size).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        first_s, _ = run(network, x)
        rounds = [run(network, x) for _ in range(ROUNDS)]
    wall_s, cpu_s = min(wall for wall, _ in rounds), statistics.median(cpu for _, cpu in rounds)
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    shape = f"{size[0]}x{size[1]}"
    return f"{preset.name:20} {shape:>11} {flop / 1e12:7.3f} {wall_s:10.2f} {cpu_s:8.2f} {first_s:8.2f} {peak_gib:9.2f}"


def run(network: Callable[..., torch.Tensor], x: torch.Tensor) -> tuple[float, float]:
    """Return wall and CPU seconds of one forward pass."""
    wall, cpu = time.perf_counter(), time.process_time()
    network(x)
    return time.perf_counter() - wall, time.process_time() - cpu


def build(preset: Preset) -> nn.Module:
    if preset.architecture != "birefnet":
        return U2Net(preset.architecture)
    assert preset.patch_order is not None
    return BiRefNet(preset.backbone, preset.patch_order)


def count_flop(preset: Preset, size: tuple[int, int]) -> int:
    """Count multiplications and additions of one image without computing it, including deformable convolutions."""
    with torch.device("meta"):
        network, x = build(preset).eval(), torch.empty(1, 3, *size)
    deformable = {torch.ops.torchvision.deform_conv2d: _deformable_flop}
    with FlopCounterMode(display=False, custom_mapping=deformable) as counter, torch.no_grad():
        network(x)
    return int(counter.get_total_flops())


def _deformable_flop(
    x_shape: Any, weight_shape: Any, *arguments: Any, out_shape: Any = None, **options: Any
) -> int:  # the signature of torch's formulas
    return int(2 * prod(out_shape) * prod(weight_shape[1:]))


if __name__ == "__main__":
    main()
