"""Files that break pipelines, as one job through a running worker: each is done or refused by its code, nothing is
published for a refused one, and the worker is the same process afterwards, its memory bounded.
"""

from __future__ import annotations

import csv
import io
import json
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from jobs.s3.client import Location, Store
from producer.demo.local_stack import LocalStack, Process
from tests.support.environment import Run
from tests.support.factories import Places, decode, fetch, sample_image

MEMORY_MB = 2000
REFUSED = {
    file: code
    for code, files in {
        "truncated": (
            "avif_cut_half.avif gif_truncated.gif heic_truncated.heic jpeg_corrupt_header.jpg "
            "jpeg_cut_3bytes.jpg jpeg_cut_half.jpg jpeg_truncated.jpg png_truncated.png webp_cut_half.webp"
        ),
        "damaged": (
            "bomb_png_text.png gif_zero_width.gif png_bad_colortype.png png_bad_ihdr_crc.png "
            "png_broken_stream.png png_unknown_compression.png tiff_fuzz1.tif tiff_oom.tif"
        ),
        "too_many_pixels": ("bmp_badwidth.bmp bomb_png_30000_1bit.png jpeg_zero_dim.jpg"),
        "not_an_image": ("elf_as.png heic_no_image.heic html_as.png one_byte.png text_as.jpg zero_byte.jpg"),
        "unsupported_format": ("ico_multi.ico psd_rgb.psd svg_plain.svg tga_rle.tga"),
    }.items()
    for file in files.split()
}
"""Of the collection: codes that people may write rules on. The others are done."""


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    body = io.BytesIO()
    image.save(body, form, **options)
    return body.getvalue()


def png_of_claimed_size(side: int) -> bytes:
    data = bytearray(saved(Image.new("1", (8, 8)), "PNG"))
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def made_here() -> dict[str, tuple[bytes, str]]:
    """Body, and `done` or the code of its refusal, by name."""
    image = decode(sample_image())
    jpeg = saved(image, "JPEG")
    return {
        "cmyk.jpg": (saved(image.convert("CMYK"), "JPEG"), "done"),
        "depth16.png": (saved(image.convert("I;16"), "PNG"), "done"),
        "palette.gif": (saved(image.quantize(16), "GIF"), "done"),
        "turned.tif": (saved(image, "TIFF", tiffinfo={274: 6}), "done"),
        "wrong-name.png": (jpeg, "done"),
        "one-pixel.png": (saved(image.resize((1, 1)), "PNG"), "done"),
        "thin.png": (saved(image.resize((3000, 1)), "PNG"), "done"),
        "blank.jpg": (saved(Image.new("RGB", (300, 200), "white"), "JPEG"), "done"),
        "half.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "page.jpg": (b"<!doctype html><title>404</title>", "not_an_image"),
        "drawing.svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "unsupported_format"),
        "bomb.png": (png_of_claimed_size(30_000), "too_many_pixels"),
        "header.png": (saved(image, "PNG")[:20] + bytes(40), "damaged"),
    }


def collection(folder: Path) -> dict[str, tuple[bytes, str]]:
    """Where its manifest leaves a choice, ours is `REFUSED`."""
    if not (folder / "manifest.csv").exists():
        return {}
    with (folder / "manifest.csv").open(encoding="utf-8") as lines:
        expected = {row["file"]: row["expected"] for row in csv.DictReader(lines)}
    for name, end in expected.items():
        assert ("clear error" if name in REFUSED else "processed") in end, name
    return {f"collection/{name}": ((folder / name).read_bytes(), REFUSED.get(name, "done")) for name in expected}


def peak_resident_mb(pid: int) -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """Of its own: what its worker takes at most, it takes for these files."""
    with LocalStack(tmp_path_factory.mktemp("hard")) as stack:
        yield stack


@pytest.fixture(scope="module")
def worker(stack: LocalStack) -> Process:
    stack.start_dispatcher()
    return stack.start_worker(device="cpu", memory_mb=str(MEMORY_MB))


def test_files_that_break_pipelines_are_done_or_refused_and_the_worker_lives(
    worker: Process, cutfleet: Run, store: Store, places: Places, shared_data: Path
) -> None:
    files = made_here() | collection(shared_data / "hard")
    for name, (body, _) in files.items():
        store.put(places.key(name), body, content_type="image/*")

    ran = cutfleet("submit", places.source, "--to", places.to, "--wait", timeout_s=280)

    assert ran.returncode == 1, ran.stderr
    told = json.loads(cutfleet("status", ran.stdout.strip(), "--json", "--failed").stdout)
    failures = {row["key"]: row["code"] for row in told["failures"]}
    assert (told["total"], told["open"], told["done"] + told["failed"]) == (len(files), 0, len(files))
    assert {name: failures.get(name, "done") for name in files} == {name: end for name, (_, end) in files.items()}
    published = {found.key for found in store.list_source(Location.parse(places.to))}
    for name in files:
        pair = {places.cutout(name).key, places.mask(name).key}
        assert published & pair == (set() if name in failures else pair), name
    turned = decode(fetch(store, places.cutout("turned.tif")))
    assert turned.size == (120, 160)
    assert worker.poll() is None
    peak_mb = peak_resident_mb(worker.pid)
    print(f"{len(files)} files, {len(failures)} refused, at most {peak_mb:.0f} MB")
    assert peak_mb < MEMORY_MB
