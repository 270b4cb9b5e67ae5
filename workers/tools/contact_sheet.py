"""Draw a contact sheet: one PNG with a row for each image: original, mask, cutout on a checkerboard, and the worst edge
at 100 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from workers.imaging.decode import Limits, decode_image
from workers.imaging.encode import encode_flat_png
from workers.imaging.pixels import Pixels
from workers.imaging.quality import find_worst_edge

_CELL, _GAP, _CAPTION = 300, 12, 22
"""Pixels: side of a cell, space around it, height of a caption line."""
_COLUMNS = ("original", "mask", "cutout", "worst edge, 100 %")
_PAPER, _INK, _FAINT = (250, 250, 250), (30, 30, 30), (120, 120, 120)
_SQUARE = 10
_LIGHT, _DARK = 235, 200


@dataclasses.dataclass(frozen=True)
class SheetRow:
    """`source`, `cutout`, `mask`: files. `caption`: text above the row."""

    caption: str
    source: bytes
    cutout: bytes
    mask: bytes


def draw_sheet(rows: Sequence[SheetRow], path: Path) -> None:
    """Write the sheet as PNG to `path`. Decodes one row at a time."""
    width = len(_COLUMNS) * (_CELL + _GAP) + _GAP
    height = (_CELL + _CAPTION + _GAP) * len(rows) + _CAPTION + _GAP
    sheet = np.full((height, width, 3), _PAPER, np.uint8)
    _write(sheet, [(name, at) for at, name in enumerate(_COLUMNS)], top=_GAP // 2, ink=_FAINT)
    for at, row in enumerate(rows):
        top = _CAPTION + _GAP + at * (_CELL + _CAPTION + _GAP)
        _write(sheet, [(row.caption, 0)], top=top, ink=_INK)
        for column, image in enumerate(_cells(row)):
            left = _GAP + column * (_CELL + _GAP)
            sheet[top + _CAPTION : top + _CAPTION + _CELL, left : left + _CELL] = image
    path.write_bytes(encode_flat_png(sheet, text={"Software": "Cutfleet"}))


def sheet_of_folder(folder: Path, path: Path) -> int:
    """Draw the sheet of a folder with `sources/`, `cutouts/` and `masks/`, the outputs named after their sources
    (`cutouts/a.jpg.png`). Skips sources without outputs. Returns the number of rows; writes no file if it is 0.
    """
    rows = list(_rows_of(folder))
    if rows:
        draw_sheet(rows, path)
    return len(rows)


def main(argv: list[str]) -> int:
    """Write FOLDER/contact-sheet.png. Exit code 1 if there is no row."""
    parser = argparse.ArgumentParser("python -m workers sheet", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    rows = sheet_of_folder(folder, folder / "contact-sheet.png")
    if not rows:
        print(
            f"No file in {folder}/sources has both a cutout and a mask: no contact sheet is written.", file=sys.stderr
        )
    return 0 if rows else 1


def _rows_of(folder: Path) -> Iterable[SheetRow]:
    for source in sorted(path for path in (folder / "sources").rglob("*") if path.is_file()):
        name = source.relative_to(folder / "sources").as_posix()
        cutout, mask = folder / "cutouts" / f"{name}.png", folder / "masks" / f"{name}.png"
        if cutout.is_file() and mask.is_file():
            yield SheetRow(name, source.read_bytes(), cutout.read_bytes(), mask.read_bytes())


def _cells(row: SheetRow) -> list[Pixels]:
    source = _decode_on_checkerboard(row.source)
    cutout = _decode_on_checkerboard(row.cutout)
    mask = decode_image(row.mask, limits=Limits(), animation="first").rgb
    return [_fit(source), _fit(mask), _fit(cutout), crop_worst_edge(cutout, mask[..., 0], side=_CELL)]


def crop_worst_edge(cutout: Pixels, mask: Pixels, *, side: int) -> Pixels:
    """Crop the worst edge at full size, (`side`, `side`, 3), padded if the image is smaller. `cutout`: flattened."""
    crop = cutout[find_worst_edge(mask, side)]
    missing = [side - length for length in crop.shape[:2]]
    borders = (missing[0] // 2, missing[0] - missing[0] // 2, missing[1] // 2, missing[1] - missing[1] // 2)
    return np.asarray(cv2.copyMakeBorder(crop, *borders, cv2.BORDER_CONSTANT, value=_PAPER), np.uint8)


def _decode_on_checkerboard(data: bytes) -> Pixels:
    """Return (H, W, 3), transparent pixels on a checkerboard."""
    image = decode_image(data, limits=Limits(), animation="first")
    if image.alpha is None:
        return image.rgb
    share = cv2.cvtColor(image.alpha, cv2.COLOR_GRAY2RGB)
    board = _checkerboard(*image.alpha.shape)
    over, under = cv2.multiply(image.rgb, share, scale=1 / 255), cv2.multiply(board, 255 - share, scale=1 / 255)
    return np.asarray(cv2.add(over, under), np.uint8)


def _checkerboard(height: int, width: int) -> Pixels:
    y, x = np.ogrid[0:height, 0:width]
    squares = np.where((y // _SQUARE + x // _SQUARE) % 2, _DARK, _LIGHT).astype(np.uint8)
    return np.asarray(cv2.cvtColor(squares, cv2.COLOR_GRAY2RGB), np.uint8)


def _fit(rgb: Pixels) -> Pixels:
    """Shrink the image to a cell and centre it; never enlarge it."""
    height, width = rgb.shape[:2]
    scale = min(1.0, _CELL / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = rgb if scale == 1 else cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
    cell = np.full((_CELL, _CELL, 3), _PAPER, np.uint8)
    top, left = (_CELL - size[1]) // 2, (_CELL - size[0]) // 2
    cell[top : top + size[1], left : left + size[0]] = small
    return cell


def _write(sheet: Pixels, labels: Iterable[tuple[str, int]], *, top: int, ink: tuple[int, int, int]) -> None:
    """`labels`: text and the column that it begins at."""
    strip = Image.fromarray(sheet[top : top + _CAPTION])
    draw = ImageDraw.Draw(strip)
    font = ImageFont.load_default(size=13)
    for text, column in labels:
        draw.text((_GAP + column * (_CELL + _GAP), 2), text, font=font, fill=ink)
    sheet[top : top + _CAPTION] = np.asarray(strip)
