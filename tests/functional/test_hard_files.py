"""Hard files as one job through a running worker: each is done or fails with its code, a failed file has no outputs,
and the worker survives within its memory limit.
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
from typing import Any

import pytest
from PIL import Image

from jobs.s3.client import Store
from producer.demo.local_stack import LocalStack, Process
from tests.support.environment import Run
from tests.support.images import decode_image, sample_image
from tests.support.places import Places, fetch_output

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
"""Codes of the failing files of the collection; the others are done."""


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    body = io.BytesIO()
    image.save(body, form, **options)
    return body.getvalue()


def png_of_claimed_size(side: int) -> bytes:
    data = bytearray(encode(Image.new("1", (8, 8)), "PNG"))
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def make_files() -> dict[str, tuple[bytes, str]]:
    """Return body and expected result (`done` or a code) by name."""
    image = decode_image(sample_image())
    jpeg = encode(image, "JPEG")
    return {
        "cmyk.jpg": (encode(image.convert("CMYK"), "JPEG"), "done"),
        "depth16.png": (encode(image.convert("I;16"), "PNG"), "done"),
        "palette.gif": (encode(image.quantize(16), "GIF"), "done"),
        "turned.tif": (encode(image, "TIFF", tiffinfo={274: 6}), "done"),
        "wrong-name.png": (jpeg, "done"),
        "one-pixel.png": (encode(image.resize((1, 1)), "PNG"), "done"),
        "thin.png": (encode(image.resize((3000, 1)), "PNG"), "done"),
        "blank.jpg": (encode(Image.new("RGB", (300, 200), "white"), "JPEG"), "done"),
        "half.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "page.jpg": (b"<!doctype html><title>404</title>", "not_an_image"),
        "drawing.svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "unsupported_format"),
        "bomb.png": (png_of_claimed_size(30_000), "too_many_pixels"),
        "header.png": (encode(image, "PNG")[:20] + bytes(40), "damaged"),
    }


def read_collection(folder: Path) -> dict[str, tuple[bytes, str]]:
    """Return the optional collection in the form of `make_files`. `REFUSED` decides where its manifest allows both."""
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
    """A stack of its own, so that the worker's peak memory is of these files."""
    with LocalStack(tmp_path_factory.mktemp("hard")) as stack:
        yield stack


@pytest.fixture(scope="module")
def worker(stack: LocalStack) -> Process:
    stack.start_dispatcher()
    return stack.start_worker(device="cpu", memory_mb=str(MEMORY_MB))


def test_hard_files_are_done_or_fail_with_their_code_and_the_worker_survives(
    worker: Process, cutfleet: Run, store: Store, places: Places, shared_data: Path
) -> None:
    files = make_files() | read_collection(shared_data / "hard")
    for name, (body, _) in files.items():
        store.put(places.key(name), body, content_type="image/*")

    ran = cutfleet("submit", places.source, "--to", places.to, "--wait", timeout_s=280)

    assert ran.returncode == 1, ran.stderr
    status = json.loads(cutfleet("status", ran.stdout.strip(), "--json", "--failed").stdout)
    failures = {row["key"]: row["code"] for row in status["failures"]}
    assert (status["total"], status["open"], status["done"] + status["failed"]) == (len(files), 0, len(files))
    assert {name: failures.get(name, "done") for name in files} == {name: end for name, (_, end) in files.items()}
    published = {found.key for found in store.list_source(places.destination)}
    for name in files:
        pair = {places.cutout(name).key, places.mask(name).key}
        assert published & pair == (set() if name in failures else pair), name
    turned = decode_image(fetch_output(store, places.cutout("turned.tif")))
    assert turned.size == (120, 160)
    assert worker.poll() is None
    peak_mb = peak_resident_mb(worker.pid)
    print(f"{len(files)} files, {len(failures)} failed, peak {peak_mb:.0f} MB")
    assert peak_mb < MEMORY_MB
