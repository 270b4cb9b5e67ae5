"""Create ICC profiles from published numbers: Display P3 and Adobe RGB (1998), and a CMYK press with a lookup table.

Source: ICC.1:2010 (version 4) and ICC.1:2001-04 (version 2, whose table stores Lab in eight bits).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

D65 = (0.3127, 0.3290)
D50 = np.array([0.9642, 1.0, 0.8249])
DISPLAY_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
"""Chromaticities of red, green and blue: SMPTE EG 432-1. Curve: IEC 61966-2-1, as for sRGB."""
ADOBE_RGB = ((0.640, 0.330), (0.210, 0.710), (0.150, 0.060))
"""Adobe RGB (1998) Color Image Encoding, 2005. Curve: a power of 563/256."""
ADOBE_GAMMA = 563 / 256
SRGB = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))
GRID = 9
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def display_p3() -> bytes:
    curve = b"para" + struct.pack(">4xHH5i", 3, 0, *map(_fixed, (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)))
    return _matrix_profile(to_d50(DISPLAY_P3), curve, version=4)


def adobe_rgb() -> bytes:
    return _matrix_profile(to_d50(ADOBE_RGB), b"curv" + struct.pack(">4xIH", 1, 563), version=2)


def cmyk_press() -> bytes:
    """Device to Lab by a table of eight bits, as in profiles of presses. A source needs no table for the way back."""
    ramps = np.tile(np.arange(256, dtype=np.uint8), 4).tobytes()
    steps = np.linspace(0, 1, GRID)
    inks = np.stack(np.meshgrid(steps, steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 4)
    lab = press_lab(inks)
    table = np.rint(np.column_stack([lab[:, 0] * 2.55, lab[:, 1:] + 128])).clip(0, 255).astype(np.uint8)
    identity = [_fixed(value) for value in np.eye(3).reshape(-1)]
    mft1 = b"mft1" + struct.pack(">4xBBBx9i", 4, 3, GRID, *identity) + ramps + table.tobytes() + ramps[:768]
    return _profile({b"A2B0": mft1}, device=b"prtr", space=b"CMYK", connection=b"Lab ", version=2)


def press_lab(inks: Floats) -> Floats:
    """(N, 4) shares of cyan, magenta, yellow and black -> (N, 3) Lab, by the product of what each ink transmits."""
    cyan, magenta, yellow, black = inks.T[..., None]
    light = (1 - cyan * [0.95, 0.45, 0.15]) * (1 - magenta * [0.15, 0.92, 0.45]) * (1 - yellow * [0.02, 0.12, 0.93])
    xyz = (light * (1 - 0.94 * black)) @ to_d50(SRGB).T
    ratio = xyz / D50
    f = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=-1)


def to_d50(primaries: tuple[tuple[float, float], ...]) -> Floats:
    """(3, 3): linear red, green, blue with white D65 -> XYZ under D50, adapted by Bradford."""
    columns = np.array([_xyz(*xy) for xy in primaries]).T
    white = _xyz(*D65)
    plain = columns * np.linalg.solve(columns, white)
    cones = np.diag((_BRADFORD @ D50) / (_BRADFORD @ white))
    return np.asarray(np.linalg.inv(_BRADFORD) @ cones @ _BRADFORD @ plain)


def to_srgb(linear: Floats, primaries: tuple[tuple[float, float], ...]) -> Floats:
    """(..., 3) linear light of those primaries -> sRGB, 0 to 255, clipped outside sRGB's gamut."""
    light = (linear @ to_d50(primaries).T @ np.linalg.inv(to_d50(SRGB)).T).clip(0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def srgb_to_linear(coded: Floats) -> Floats:
    return np.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4)


def _xyz(x: float, y: float) -> Floats:
    return np.array([x / y, 1.0, (1 - x - y) / y])


def _matrix_profile(matrix: Floats, curve: bytes, *, version: int) -> bytes:
    tags = {name: _xyz_tag(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), matrix.T, strict=True)}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    return _profile(tags, device=b"mntr", space=b"RGB ", connection=b"XYZ ", version=version)


def _profile(tags: Mapping[bytes, bytes], *, device: bytes, space: bytes, connection: bytes, version: int) -> bytes:
    tags = {
        b"desc": _text(b"Made for a test", version),
        b"cprt": _text(b"None", version),
        b"wtpt": _xyz_tag(D50),
        **tags,
    }
    at, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = at + len(body)
    header = struct.pack(">I4xI4s4s4s", size, version << 24, device, space, connection) + bytes(12) + b"acsp"
    header = header.ljust(68, b"\0") + struct.pack(">3i", *map(_fixed, D50))
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _text(words: bytes, version: int) -> bytes:
    if version == 4:
        return (
            b"mluc"
            + struct.pack(">4xII2s2sII", 1, 12, b"en", b"US", 2 * len(words), 28)
            + words.decode().encode("utf-16-be")
        )
    return b"desc" + struct.pack(">4xI", len(words) + 1) + words + bytes(1 + 78)


def _xyz_tag(xyz: Floats) -> bytes:
    return b"XYZ " + struct.pack(">4x3i", *map(_fixed, xyz))


def _fixed(value: float) -> int:
    """s15Fixed16Number."""
    return round(float(value) * 65536)
