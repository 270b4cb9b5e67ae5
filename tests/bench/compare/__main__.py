"""Alternatives against ours: the same images, weights (u2netp, float32) and processor cores.

    python -m tests.bench.compare [--rounds N] [--size 12MP] [--only NAME] [--envs FOLDER] [--json FILE]

The model card's script in a loop over S3; plain Celery tasks with Pillow; Ray Data with our functions; `rembg p` on a
folder, without S3. Their start, imports and loading are not counted; our job is measured from before its submission
until its last image is done. Ray and rembg are installed into their own environments (`--envs`); rembg uses our weights
as an ONNX file. All run in turn within each round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from jobs.recipe import Recipe
from jobs.s3.location import Location
from producer.demo.local_stack import Process, inherited_environment
from tests.bench.compare import differences
from tests.bench.compare.recipe import load_model
from tests.bench.flow import Fleet, run_fleet
from tests.bench.image_path import SIZES
from tests.bench.report import Row, fact, progress, row, run_benchmark
from tests.bench.worker import SLOTS
from workers.imaging.pixels import Pixels
from workers.models.checkpoint import fill, read_weights
from workers.models.model_files import PACKAGED
from workers.models.u2net import U2Net, fold_batch_norm

ROOT = Path(__file__).parents[3]
PHOTO = ROOT / "producer/demo/samples/astronaut.jpg"
OURS = "ours"
SCRIPTS = {"model card's script over S3": "card_script", "plain Celery with Pillow": "plain_celery"}
RAY, REMBG = "Ray Data, our functions", "rembg p on a folder"
NAMES = [*SCRIPTS, RAY, REMBG]
FILTERS = {**dict.fromkeys(SCRIPTS, differences.CARD), REMBG: differences.REMBG}
COUNTS = {
    "12MP": {OURS: 32, "model card's script over S3": 3, "plain Celery with Pillow": 6, RAY: 16, REMBG: 3},
    "2MP": {OURS: 96, "model card's script over S3": 10, "plain Celery with Pillow": 20, RAY: 48, REMBG: 12},
}
"""Images per round: some ten seconds for each."""
PACKAGES = {"ray": ["ray[data]"], "rembg": ["rembg[cpu,cli]"]}
EDGES: tuple[Literal["off", "estimate"], ...] = ("off", "estimate")
FIRST = "p00000.jpg"
EQUAL = 2
"""Grey levels that rounding and two JPEG decoders may differ by."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", choices=COUNTS, action="append", help="default: all")
    parser.add_argument("--only", choices=NAMES, action="append", help="compared with ours; default: all")
    parser.add_argument("--envs", type=Path, default=ROOT / ".venv-compare")
    run_benchmark(parser, measure)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    names = options.only or NAMES
    needed = [name for name in PACKAGES if any(tool.lower().startswith(name) for tool in names)]
    programs = {name: prepare_environment(options.envs, name) for name in needed}
    with run_fleet() as fleet:
        worker = fleet.stack.start_worker(slots=str(SLOTS), device="cpu", node="ours")
        for size in options.size or COUNTS:
            yield from Comparison(fleet, worker, size, programs).run(names, options.rounds)


class Comparison:
    """All tools on one size of image. Their outputs stay in buckets, to be compared."""

    def __init__(self, fleet: Fleet, worker: Process, size: str, programs: Mapping[str, Path]) -> None:
        self.fleet, self.worker, self.size, self.programs = fleet, worker, size, programs
        self.bucket = f"photos-{size.lower()}"
        self.photo = make_photo(*SIZES[size.replace("MP", " MP")])
        self.folder = fleet.stack.folder / size
        fleet.upload(self.bucket, max(COUNTS[size].values()), self.photo)
        fleet.upload(f"{self.bucket}-one", 1, self.photo)

    def run(self, names: list[str], rounds: int) -> Iterator[Row]:
        rates: dict[str, list[float]] = {}
        if REMBG in names:
            self._rembg(1)  # the first command compiles what later ones use
        for _ in range(rounds):
            for edges in EDGES:
                flow = self.fleet.run(self.bucket, Recipe(edges=edges), [self.worker], slots=SLOTS)
                rates.setdefault(f"{OURS}, edges {'off' if edges == 'off' else 'on'}", []).append(flow.whole_rate)
            for name in names:
                rates.setdefault(name, []).append(COUNTS[self.size][name] / self._seconds(name))
            progress(f"{self.size}: " + ", ".join(f"{name} {values[-1]:.2f}" for name, values in rates.items()))
        yield from self._rows(rates, names)
        yield from self._differences(names)

    def _rows(self, rates: Mapping[str, list[float]], names: list[str]) -> Iterator[Row]:
        for edges in ("off", "on"):
            own = rates[f"{OURS}, edges {edges}"]
            for name in names:
                what = f"{self.size}: ours, edges {edges}"
                yield row(what, own, "images/s", against=name, others=rates[name], better="more")

    def _seconds(self, name: str) -> float:
        count = COUNTS[self.size][name]
        if name == REMBG:
            return self._rembg(count + 1) - self._rembg(1)
        python = self.programs["ray"] if name == RAY else Path(sys.executable)
        module = "ray_data" if name == RAY else SCRIPTS[name]
        target = self._target(name)
        with self.fleet.stack.store() as store:
            store.create_bucket(target)
        command = [str(python), "-m", f"tests.bench.compare.{module}", self.bucket, target, str(count)]
        output = run_program(command, self._environment())
        return float(json.loads(output.splitlines()[-1])["seconds"])

    def _rembg(self, count: int) -> float:
        """Return the seconds of the whole command with its start; the caller takes the difference of two runs."""
        photos, results = self.folder / "photos", self.folder / "results"
        for folder in (photos, results):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        for number in range(count):
            (photos / f"p{number:05d}.jpg").write_bytes(self.photo)
        python = self.programs["rembg"]
        home = {"REMBG_HOME": str(python.parents[1] / "models-home"), "MODEL_CHECKSUM_DISABLED": "1"}
        command = [str(python.with_name("rembg")), "p", "-m", "u2netp", str(photos), str(results)]
        started = time.perf_counter()
        run_program(command, inherited_environment() | home)
        return time.perf_counter() - started

    def _differences(self, names: list[str]) -> Iterator[Row]:
        """Compare alpha with ours everywhere, and colour where both are visible."""
        ours = f"{self.bucket}-ours"
        with self.fleet.stack.store() as store:
            store.create_bucket(ours)
        self.fleet.run(f"{self.bucket}-one", Recipe(edges="off"), [self.worker], slots=0, target=ours)
        mine, model = self._cutout(ours), load_model(threads=1)
        for name in names:
            theirs = self._rembg_cutout() if name == REMBG else self._cutout(self._target(name))
            least = 255 if name == REMBG else 1  # rembg's colours are multiplied by alpha
            both = (mine[..., 3] >= least) & (theirs[..., 3] >= least)
            yield from self._measure_difference(f"{name}: alpha difference from ours", mine[..., 3], theirs[..., 3])
            shown = 100 * float(both.mean())
            yield fact(f"{self.size}: {name}: alpha at least {least} in both", shown, "% of pixels")
            colour = float(differences.difference(mine, theirs)[both][:, :3].max()) if both.any() else 0.0
            yield fact(f"{self.size}: {name}: greatest colour difference there", colour, "grey levels")
            if name in FILTERS:
                again, as_ours = (
                    differences.compute_alpha(self.photo, model, kind) for kind in (FILTERS[name], differences.OURS)
                )
                yield from self._measure_difference(
                    f"{name}: its steps repeated here, difference from its own alpha", again, theirs[..., 3]
                )
                yield from self._measure_difference(
                    f"{name}: the same with our resizing, difference from ours", as_ours, mine[..., 3]
                )

    def _measure_difference(self, what: str, one: Pixels, other: Pixels) -> Iterator[Row]:
        levels = differences.difference(one, other)
        yield fact(f"{self.size}: {what}, greatest", float(levels.max()), "grey levels")
        yield fact(f"{self.size}: {what}, by more than {EQUAL}", 100 * float((levels > EQUAL).mean()), "% of pixels")

    def _cutout(self, bucket: str) -> Pixels:
        location = Location(bucket, f"cutouts/{FIRST}.png")
        with self.fleet.stack.store() as store:
            return as_pixels(store.get(location, role="output", max_bytes=200_000_000)[0])

    def _rembg_cutout(self) -> Pixels:
        return as_pixels((self.folder / "results" / FIRST).with_suffix(".png").read_bytes())

    def _target(self, name: str) -> str:
        return f"{self.bucket}-{name.split()[0].lower()}"

    def _environment(self) -> dict[str, str]:
        stack = self.fleet.stack.environment
        more = {"AWS_ENDPOINT_URL_S3": stack["CUTFLEET_S3_ENDPOINT"], "PYTHONPATH": str(ROOT)}
        return inherited_environment() | stack | more


def make_photo(height: int, width: int) -> bytes:
    """Return an enlarged photograph of a subject with sensor noise, as JPEG at quality 92."""
    small = cv2.imread(str(PHOTO))
    assert small is not None
    large = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.float32)
    noise = np.random.default_rng(3).normal(scale=3, size=large.shape)
    large += np.asarray(noise, np.float32)
    is_encoded, body = cv2.imencode(".jpg", large.clip(0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 92])
    assert is_encoded
    return body.tobytes()


def as_pixels(png: bytes) -> Pixels:
    pixels = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    assert pixels is not None
    assert pixels.shape[2] == 4
    return np.asarray(pixels)


def run_program(command: list[str], environment: Mapping[str, str]) -> str:
    ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


def prepare_environment(folder: Path, name: str) -> Path:
    """Create an environment unless it exists; return its Python. Ray's sees our packages, because our functions run in
    it; rembg's does not."""
    home = folder / name
    python = home / "bin" / "python"
    if (home / "ready").exists():
        return python
    progress(f"installing {name} into {home}")
    venv.create(home, with_pip=True, clear=True)
    inside = next((home / "lib").glob("python*")) / "site-packages"
    if name == "ray":
        (inside / "ours.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    else:
        export_onnx(home / "models-home" / "models" / "u2netp" / "u2netp.onnx")
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, *PACKAGES[name]], check=True, env=dict(os.environ))
    (home / "ready").touch()
    return python


class _Alpha(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.network(x))


def export_onnx(path: Path) -> None:
    """Write our u2netp in the form that rembg reads."""
    path.parent.mkdir(parents=True)
    network = U2Net("u2netp").eval()
    fill(network, fold_batch_norm(read_weights(PACKAGED["u2netp"])), name="u2netp")
    export: Callable[..., object] = torch.onnx.export
    names = {"input_names": ["input"], "output_names": ["mask"]}
    export(_Alpha(network), (torch.zeros(1, 3, 320, 320),), str(path), dynamo=False, **names)


if __name__ == "__main__":
    main()
