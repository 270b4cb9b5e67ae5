"""Contact sheet: one PNG to look at, a row an image: original, mask, cutout on a checkerboard, and the worst edge at
100 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from workers.imaging.decode import Limits, decode_image
from workers.imaging.encode import encode_flat_png
from workers.imaging.quality import find_worst_edge

Pixels = NDArray[np.uint8]

_CELL, _GAP, _CAPTION = 300, 12, 22
"""Pixels: side of a cell, space around it, height of a caption line."""
_COLUMNS = ("original", "mask", "cutout", "worst edge, 100 %")
_PAPER, _INK, _FAINT = (250, 250, 250), (30, 30, 30), (120, 120, 120)
_SQUARE = 10
_LIGHT, _DARK = 235, 200


@dataclasses.dataclass(frozen=True)
class SheetRow:
    """`source`, `cutout`, `mask`: whole files. `caption`: stands above the row."""

    caption: str
    source: bytes
    cutout: bytes
    mask: bytes


def contact_sheet(rows: Sequence[SheetRow], path: Path) -> None:
    """Writes one PNG. One row is decoded at a time."""
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
    """`folder` holds `sources/`, `cutouts/` and `masks/`, outputs named after their sources (`cutouts/a.jpg.png`).
    Sources without outputs are left out. Returns the number of rows; writes nothing when there is none.
    """
    rows = list(_rows_of(folder))
    if rows:
        contact_sheet(rows, path)
    return len(rows)


def main(argv: list[str]) -> int:
    """`python -m workers sheet FOLDER`: writes FOLDER/contact-sheet.png. Exit code 1 when there is nothing to show."""
    parser = argparse.ArgumentParser("python -m workers sheet", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    rows = sheet_of_folder(folder, folder / "contact-sheet.png")
    if not rows:
        print(f"{folder} holds no source with a cutout and a mask: nothing to show.", file=sys.stderr)
    return 0 if rows else 1


def _rows_of(folder: Path) -> Iterable[SheetRow]:
    for source in sorted(path for path in (folder / "sources").rglob("*") if path.is_file()):
        name = source.relative_to(folder / "sources").as_posix()
        cutout, mask = folder / "cutouts" / f"{name}.png", folder / "masks" / f"{name}.png"
        if cutout.is_file() and mask.is_file():
            yield SheetRow(name, source.read_bytes(), cutout.read_bytes(), mask.read_bytes())


def _cells(row: SheetRow) -> list[Pixels]:
    source = _shown(row.source)
    cutout = _shown(row.cutout)
    mask = decode_image(row.mask, limits=Limits(), animation="first").rgb
    return [_fitted(source), _fitted(mask), _fitted(cutout), worst_edge(cutout, mask[..., 0], side=_CELL)]


def worst_edge(cutout: Pixels, mask: Pixels, *, side: int) -> Pixels:
    """(`side`, `side`, 3): the worst edge at full size, `cutout` already flattened; padded where the image is
    smaller.
    """
    shown = cutout[find_worst_edge(mask, side)]
    padded = [side - length for length in shown.shape[:2]]
    borders = (padded[0] // 2, padded[0] - padded[0] // 2, padded[1] // 2, padded[1] - padded[1] // 2)
    return np.asarray(cv2.copyMakeBorder(shown, *borders, cv2.BORDER_CONSTANT, value=_PAPER), np.uint8)


def _shown(data: bytes) -> Pixels:
    """As a viewer would, on a checkerboard where it is transparent."""
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


def _fitted(rgb: Pixels) -> Pixels:
    """Into a cell, whole and centred, never enlarged."""
    height, width = rgb.shape[:2]
    scale = min(1.0, _CELL / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = rgb if scale == 1 else cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
    cell = np.full((_CELL, _CELL, 3), _PAPER, np.uint8)
    top, left = (_CELL - size[1]) // 2, (_CELL - size[0]) // 2
    cell[top : top + size[1], left : left + size[0]] = small
    return cell


def _write(sheet: Pixels, words: Iterable[tuple[str, int]], *, top: int, ink: tuple[int, int, int]) -> None:
    """`words`: text and the column that it begins at."""
    strip = Image.fromarray(sheet[top : top + _CAPTION])
    draw = ImageDraw.Draw(strip)
    font = ImageFont.load_default(size=13)
    for text, column in words:
        draw.text((_GAP + column * (_CELL + _GAP), 2), text, font=font, fill=ink)
    sheet[top : top + _CAPTION] = np.asarray(strip)
