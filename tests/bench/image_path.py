"""The image path without the model: each stage against its naive form, and the whole against the model card's script.

    python -m tests.bench.image_path [--rounds N] [--json FILE]

One core, CPU time of this process, both forms in turn within each round. The images are synthetic: 1/f texture,
gradients and sensor noise, JPEG at quality 92; the mask is an ellipse with a soft edge.
"""

from __future__ import annotations

import argparse
import io
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from jobs.recipe import Recipe
from tests.bench.report import Row, row, run_benchmark
from workers.imaging.decode import Limits, decode_image
from workers.imaging.edges import clean_edges
from workers.imaging.encode import encode_cutout_png, encode_mask_png
from workers.imaging.pipeline import cut_out
from workers.imaging.pixels import Pixels
from workers.imaging.quality import measure_mask
from workers.imaging.resize import enlarge, shrink
from workers.models.device import limit_threads

Stage = Callable[[], object]

SIDE = 1024
SIZES = {"12 MP": (3000, 4000), "2 MP": (1250, 1600)}
PILLOW_FAST = {"compress_level": 1, "compress_type": zlib.Z_RLE}
"""Pillow's fastest settings with reasonable compression."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FixedMask:
    """A model that costs nothing."""

    input_size = (SIDE, SIDE)

    def __init__(self, mask: Pixels) -> None:
        self.mask = mask

    def predict(self, rgb: Pixels, *, live: bool = False) -> Pixels:
        return self.mask


def make_photo(height: int, width: int) -> bytes:
    random = np.random.default_rng(12)
    image = np.zeros((height, width, 3), np.float32)
    for scale in (2, 4, 8, 16, 32, 64, 128, 256):
        noise = random.normal(size=(height // scale + 2, width // scale + 2, 3)).astype(np.float32)
        image += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC) * scale**0.8
    image = (image - image.min()) * (255 / np.ptp(image))
    image += cv2.GaussianBlur(random.normal(size=image.shape).astype(np.float32) * 8, (0, 0), 0.7)
    out = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=92)
    return out.getvalue()


def make_mask() -> Pixels:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    cv2.ellipse(mask, (SIDE // 2, SIDE // 2), (int(SIDE * 0.33), int(SIDE * 0.36)), 20, 0, 360, 255, -1)
    return np.asarray(cv2.GaussianBlur(mask, (0, 0), 2), np.uint8)


CARD_INPUT = transforms.Compose(
    [transforms.Resize((SIDE, SIDE)), transforms.ToTensor(), transforms.Normalize(list(MEAN), list(STD))]
)


def card_script(data: bytes, mask: Pixels, **png: int) -> tuple[bytes, bytes]:
    """Do what the model card's script does around the model; return cutout and mask."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    CARD_INPUT(image)
    alpha = transforms.ToPILImage()(torch.from_numpy(mask).float() / 255).resize(image.size)
    image.putalpha(alpha)
    return pillow_png(image, **png), pillow_png(alpha, **png)


def pillow_png(image: Image.Image, **options: int) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", **options)
    return out.getvalue()


def zeroed(rgb: Pixels, alpha: Pixels) -> Image.Image:
    rgba = np.dstack([rgb, alpha])
    rgba[alpha == 0] = 0
    return Image.fromarray(rgba)


def stages(data: bytes, small: Pixels) -> Iterator[tuple[str, Stage, str, Stage | None]]:
    """Yield the stage's name, our form, the name of the naive form, and the naive form."""
    rgb = decode_image(data, limits=Limits(), animation="first").rgb
    alpha = enlarge(small, rgb.shape[:2])
    image, mask = Image.fromarray(rgb), Image.fromarray(alpha)
    model = FixedMask(small)
    yield (
        "decode",
        lambda: decode_image(data, limits=Limits(), animation="first"),
        "Pillow to numpy",
        lambda: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")),
    )
    yield "shrink to the model", lambda: shrink(rgb, (SIDE, SIDE)), "model card", lambda: CARD_INPUT(image)
    yield (
        "enlarge the mask",
        lambda: enlarge(small, rgb.shape[:2]),
        "Pillow",
        lambda: Image.fromarray(small).resize(image.size),
    )
    yield (
        "cutout PNG, composed and zeroed",
        lambda: encode_cutout_png(rgb, alpha, text={}),
        "numpy and Pillow, level 1 and RLE",
        lambda: pillow_png(zeroed(rgb, alpha), **PILLOW_FAST),
    )
    yield "mask PNG", lambda: encode_mask_png(alpha), "Pillow", lambda: pillow_png(mask)
    yield "edges", lambda: clean_edges(rgb.copy(), alpha), "", None
    yield "quality figures", lambda: measure_mask(alpha), "", None
    off, estimate = Recipe(edges="off"), Recipe(edges="estimate")
    for name, recipe in (("whole, edges off", off), ("whole, edges on", estimate)):
        ours = partial(cut_out, data, recipe, model, limits=Limits())
        yield name, ours, "model card", lambda: card_script(data, small)
        yield name, ours, "model card, Pillow level 1 and RLE", lambda: card_script(data, small, **PILLOW_FAST)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    limit_threads(1)
    small = make_mask()
    for size, shape in SIZES.items():
        data = make_photo(*shape)
        for name, ours, naive_name, naive in stages(data, small):
            yield _compare(f"{size}: {name}", ours, naive_name, naive, rounds=options.rounds)
        yield _file_size(f"{size}: cutout's file", data, small)


def _compare(name: str, ours: Stage, naive_name: str, naive: Stage | None, *, rounds: int) -> Row:
    costs: tuple[list[float], list[float]] = ([], [])
    ours()
    for _ in range(rounds):
        for times, form in zip(costs, (ours, naive), strict=True):
            if form is not None:
                started = time.process_time()
                form()
                times.append((time.process_time() - started) * 1000)
    return row(name, costs[0], "CPU ms", against=naive_name, others=costs[1])


def _file_size(name: str, data: bytes, small: Pixels) -> Row:
    """Compare the size of the cutout with Pillow's default for the same pixels."""
    rgb = decode_image(data, limits=Limits(), animation="first").rgb
    alpha = enlarge(small, rgb.shape[:2])
    ours, pillow = len(encode_cutout_png(rgb, alpha, text={})), len(pillow_png(zeroed(rgb, alpha)))
    return row(name, [ours / 1e6], "MB", against="Pillow's default, same pixels", others=[pillow / 1e6])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    run_benchmark(parser, measure)


if __name__ == "__main__":
    main()
