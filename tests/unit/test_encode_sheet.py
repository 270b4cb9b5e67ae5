"""Draw a contact sheet and read it back."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from workers.imaging.encode import encode_cutout_png, encode_mask_png
from workers.imaging.pixels import Pixels
from workers.tools.contact_sheet import crop_worst_edge, sheet_of_folder


def put_outputs(folder: Path, name: str, *, size: tuple[int, int]) -> None:
    rgb = np.full((*size, 3), (200, 30, 40), np.uint8)
    alpha = np.zeros(size, np.uint8)
    alpha[size[0] // 4 : -size[0] // 4] = 255
    source = io.BytesIO()
    Image.fromarray(rgb).save(source, "JPEG")
    outputs = {
        f"sources/{name}": source.getvalue(),
        f"cutouts/{name}.png": encode_cutout_png(rgb, alpha, text={}),
        f"masks/{name}.png": encode_mask_png(alpha),
    }
    for path, data in outputs.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


def test_a_sheet_has_a_row_for_each_image_that_has_outputs(tmp_path: Path) -> None:
    put_outputs(tmp_path, "a.jpg", size=(500, 900))
    put_outputs(tmp_path, "deep/b.jpg", size=(40, 30))
    (tmp_path / "sources" / "failed.jpg").write_bytes(b"no image")

    rows = sheet_of_folder(tmp_path, tmp_path / "sheet.png")

    assert rows == 2
    with Image.open(tmp_path / "sheet.png") as image:
        pixels = np.asarray(image)
    red = (pixels[..., 0] > 180) & (pixels[..., 1] < 60)
    assert red[:370].any() and red[370:].any()
    assert (pixels == 235).all(-1).any() and (pixels == 200).all(-1).any(), "the checkerboard is visible"


def test_a_folder_without_outputs_has_no_sheet(tmp_path: Path) -> None:
    assert sheet_of_folder(tmp_path, tmp_path / "sheet.png") == 0
    assert not (tmp_path / "sheet.png").exists()


def test_the_worst_edge_is_the_part_with_most_uncertain_alpha() -> None:
    mask = np.zeros((900, 900), np.uint8)
    mask[600:700, 500:600] = 128
    cutout: Pixels = np.zeros((900, 900, 3), np.uint8)
    cutout[600:700, 500:600] = 77

    crop = crop_worst_edge(cutout, mask, side=300)

    assert crop.shape == (300, 300, 3)
    assert (crop == 77).all(-1).sum() == 100 * 100
