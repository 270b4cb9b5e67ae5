"""Decode images of every kind that a catalogue has, generated here; check the pixels, or the error code."""

from __future__ import annotations

import csv
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageCms

from jobs.errors import ContentError
from workers.imaging.colour import srgb_profile
from workers.imaging.decode import DecodedImage, Limits, decode_image
from workers.imaging.pixels import Pixels

HARD = Path(os.environ.get("CUTFLEET_TEST_DATA", Path(__file__).parents[3] / "shared")) / "hard"


def scene(width: int = 48, height: int = 32) -> Pixels:
    """A gradient that differs in every orientation."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], axis=-1).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def decoded(data: bytes, *, limits: Limits | None = None) -> DecodedImage:
    return decode_image(data, limits=limits or Limits(), animation="first")


def error_code(data: bytes, *, limits: Limits | None = None) -> str:
    with pytest.raises(ContentError) as caught:
        decoded(data, limits=limits)
    return caught.value.code


def difference(one: Pixels, other: Pixels) -> int:
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other.astype(int)).max())


EXACT: list[tuple[str, dict[str, Any]]] = [
    ("PNG", {}),
    ("TIFF", {}),
    ("BMP", {}),
    ("WEBP", {"lossless": True}),
    ("JPEG2000", {"irreversible": False}),
]
CLOSE: list[tuple[str, dict[str, Any]]] = [
    ("JPEG", {"quality": 98}),
    ("AVIF", {"quality": 95}),
    ("HEIF", {"quality": 95}),
    ("MPO", {"quality": 98}),
]


@pytest.mark.parametrize(("kind", "options"), EXACT)
def test_lossless_formats_come_back_exactly(kind: str, options: dict[str, Any]) -> None:
    image = decoded(saved(Image.fromarray(scene()), kind, **options))

    assert np.array_equal(image.rgb, scene())
    assert image.alpha is None and image.notes == ()


@pytest.mark.parametrize(("kind", "options"), CLOSE)
def test_lossy_formats_come_back_closely(kind: str, options: dict[str, Any]) -> None:
    image = decoded(saved(Image.fromarray(scene()), kind, **options))

    assert np.abs(image.rgb.astype(int) - scene().astype(int)).mean() < 3


def test_a_gif_comes_back_within_its_palette() -> None:
    image = decoded(saved(Image.fromarray(scene()).quantize(64), "GIF"))

    assert np.array_equal(image.rgb, np.asarray(Image.fromarray(scene()).quantize(64).convert("RGB")))


@pytest.mark.parametrize("mode", ["1", "L", "P"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_one_bit_and_palette_become_rgb(mode: str, kind: str) -> None:
    image = Image.fromarray(scene()).convert(mode)

    found = decoded(saved(image, kind))

    assert np.array_equal(found.rgb, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation_comes_out_upright(orientation: int, kind: str) -> None:
    turns: dict[int, Callable[[Pixels], Pixels]] = {
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }
    stored = turns[orientation](scene()) if orientation in turns else scene()
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {"quality": 98} if kind == "JPEG" else {}

    image = decoded(saved(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options))

    assert image.rgb.shape == scene().shape
    assert np.abs(image.rgb.astype(int) - scene().astype(int)).mean() < (4 if kind == "JPEG" else 0.01)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")  # from Pillow
def test_damaged_exif_does_not_fail_an_image() -> None:
    data = saved(Image.fromarray(scene()), "JPEG", quality=98, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\1\2")

    assert decoded(data).rgb.shape == scene().shape


def wide_gamut_profile() -> bytes:
    """A matrix profile with sRGB's curves and primaries far from sRGB's: its red and green columns are exchanged."""
    profile = srgb_profile()
    table = {profile[at : at + 4]: at for at in range(132, 132 + 12 * int.from_bytes(profile[128:132], "big"), 12)}
    red, green = table[b"rXYZ"], table[b"gXYZ"]
    changed = bytearray(profile)
    changed[red + 4 : red + 12], changed[green + 4 : green + 12] = (
        profile[green + 4 : green + 12],
        profile[red + 4 : red + 12],
    )
    return bytes(changed)


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("TIFF", {}), ("JPEG", {"quality": 100})])
def test_a_profile_is_applied_as_littlecms_applies_it(kind: str, options: dict[str, Any]) -> None:
    data = saved(Image.fromarray(scene()), kind, icc_profile=wide_gamut_profile(), **options)

    ours = decoded(data).rgb

    source = ImageCms.ImageCmsProfile(io.BytesIO(wide_gamut_profile()))
    with Image.open(io.BytesIO(data)) as image:
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert converted is not None
    assert difference(ours, np.asarray(converted)) <= 1
    assert difference(ours, scene()) > 50


def test_an_srgb_profile_changes_nothing() -> None:
    image = decoded(saved(Image.fromarray(scene()), "PNG", icc_profile=srgb_profile()))

    assert np.array_equal(image.rgb, scene()) and image.notes == ()


@pytest.mark.parametrize("profile", [b"no profile at all", srgb_profile()[:300]], ids=["none", "cut"])
def test_a_broken_profile_is_ignored_and_noted(profile: bytes) -> None:
    image = decoded(saved(Image.fromarray(scene()), "PNG", icc_profile=profile))

    assert np.array_equal(image.rgb, scene())
    assert image.notes[0].startswith("icc_profile_ignored")


def test_a_profile_of_another_colour_space_is_ignored_and_noted() -> None:
    grey = Image.fromarray(scene()).convert("L")

    image = decoded(saved(grey, "PNG", icc_profile=srgb_profile()))

    assert np.array_equal(image.rgb[..., 0], np.asarray(grey))
    assert "RGB in an image of mode L" in image.notes[0]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_without_a_profile_is_not_inverted(kind: str) -> None:
    ink = np.zeros((16, 32, 4), np.uint8)
    ink[:, 16:] = (0, 255, 255, 0)
    cmyk = Image.frombytes("CMYK", (32, 16), ink.tobytes())

    rgb = decoded(saved(cmyk, kind)).rgb

    assert rgb[8, 4].min() > 250, "paper is white"
    assert rgb[8, 28, 0] > 245 and rgb[8, 28, 1:].max() < 12, "magenta and yellow are red"


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_never_clipped(kind: str) -> None:
    values = np.linspace(0, 65535, 48 * 32).astype(np.uint16).reshape(32, 48)

    rgb = decoded(saved(Image.fromarray(values), kind)).rgb

    assert np.abs(rgb[..., 0] - values / 257).max() <= 0.5
    assert np.array_equal(rgb[..., 0], rgb[..., 2])


def png16_rgb(values: NDArray[np.uint16]) -> bytes:
    """A 16-bit RGB PNG, which Pillow can't write."""
    height, width = values.shape[:2]
    lines = np.zeros((height, 1 + 6 * width), np.uint8)
    lines[:, 1:] = values.astype(">u2").view(np.uint8).reshape(height, -1)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines.tobytes())),
        (b"IEND", b""),
    ]
    body = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def test_sixteen_bit_colour_is_within_one_level_of_exact_scaling() -> None:
    values = np.random.default_rng(5).integers(0, 65536, (32, 48, 3), np.uint16)

    assert np.abs(decoded(png16_rgb(values)).rgb - values / 257).max() <= 1


def test_float_images_are_scaled_from_0_to_1_or_from_their_own_range() -> None:
    ramp = np.linspace(0, 1, 48 * 32, dtype=np.float32).reshape(32, 48)

    unit = decoded(saved(Image.fromarray(ramp), "TIFF"))
    wild = decoded(saved(Image.fromarray(ramp * 900 - 300), "TIFF"))

    assert np.abs(unit.rgb[..., 0] - ramp * 255).max() <= 0.51 and unit.notes == ()
    assert np.abs(wild.rgb[..., 0] - ramp * 255).max() <= 0.51 and "-300 to 600" in wild.notes[0]


def test_lab_becomes_srgb() -> None:
    lab = ImageCms.profileToProfile(
        Image.fromarray(scene()), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None

    assert np.abs(decoded(saved(lab, "TIFF")).rgb.astype(int) - scene().astype(int)).mean() < 3


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_alpha_is_separated_from_colour(mode: str, kind: str) -> None:
    rgba = np.dstack([scene(), scene()[..., 0]])
    image = Image.fromarray(rgba).convert(mode)

    found = decoded(saved(image, kind))

    assert found.alpha is not None and np.array_equal(found.alpha, rgba[..., 3])
    assert np.array_equal(found.rgb, np.asarray(image.convert("RGBA"))[..., :3])


def test_opaque_alpha_is_none() -> None:
    assert decoded(saved(Image.fromarray(scene()).convert("RGBA"), "PNG")).alpha is None


def test_palette_and_colour_key_transparency_become_alpha() -> None:
    palette = Image.fromarray(scene()).quantize(16)
    key = tuple(int(v) for v in scene()[3, 5])

    by_index = decoded(saved(palette, "PNG", transparency=3))
    by_colour = decoded(saved(Image.fromarray(scene()), "PNG", transparency=key))

    assert by_index.alpha is not None and np.array_equal(by_index.alpha == 0, np.asarray(palette) == 3)
    assert by_colour.alpha is not None and by_colour.alpha[3, 5] == 0 and by_colour.alpha[20, 20] == 255


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF", "TIFF"])
def test_an_animation_gives_its_first_frame_or_is_refused(kind: str) -> None:
    frames = [Image.new("RGB", (32, 24), colour) for colour in ("#c02010", "#10c020", "#2010c0")]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:])

    first = decode_image(data, limits=Limits(), animation="first").rgb
    with pytest.raises(ContentError) as caught:
        decode_image(data, limits=Limits(), animation="refuse")

    assert difference(first[10:11, 10:11], np.array([[[0xC0, 0x20, 0x10]]], np.uint8)) < 12
    assert caught.value.code == "animated"


def test_an_mpo_is_no_animation() -> None:
    frames = [Image.new("RGB", (32, 24), colour) for colour in ("#c02010", "#10c020")]
    data = saved(frames[0], "MPO", save_all=True, append_images=frames[1:])

    image = decode_image(data, limits=Limits(), animation="refuse")

    assert image.rgb[10, 10, 0] > 180


@pytest.mark.parametrize("share", [0.5, 0.8, 0.97])
@pytest.mark.parametrize(("kind", "options"), [*EXACT, *CLOSE, ("GIF", {})])
def test_a_truncated_file_is_refused_and_never_decoded_in_part(
    kind: str, options: dict[str, Any], share: float
) -> None:
    noise = np.random.default_rng(6).integers(0, 256, (64, 96, 3), np.uint8)
    data = saved(Image.fromarray(noise), kind, **options)

    assert error_code(data[: int(len(data) * share)]) in ("truncated", "damaged")


def test_a_damaged_stream_is_refused() -> None:
    data = bytearray(saved(Image.fromarray(scene()), "PNG"))
    at = data.index(b"IDAT") + 4
    data[at : at + 12] = b"\xff" * 12

    assert error_code(bytes(data)) == "damaged"


@pytest.mark.parametrize("data", [b"", b"\x89", b"<!doctype html><html>404</html>", b"\x7fELF\2\1\1" + bytes(99)])
def test_a_file_that_is_no_image_has_its_own_code(data: bytes) -> None:
    assert error_code(data) == "not_an_image"


@pytest.mark.parametrize(
    "data",
    [
        b'<?xml version="1.0"?>\n<!-- made by hand -->\n<svg xmlns="http://www.w3.org/2000/svg"/>',
        b"8BPS\0\1" + bytes(40),
        b"%PDF-1.7\n",
        b"II*\0\x10\0\0\0CR\2\0" + bytes(40),
        b"\0\0\0\x0cJXL \r\n\x87\n",
        b"\0\0\0\x18ftypmp42\0\0\0\0isommp42",
        saved(Image.new("RGB", (32, 32)), "ICO"),
        saved(Image.new("RGB", (32, 32)), "TGA"),
    ],
)
def test_an_image_of_an_unsupported_format_has_its_own_code(data: bytes) -> None:
    assert error_code(data) == "unsupported_format"


def test_the_thumbnail_of_a_raw_file_is_not_decoded() -> None:
    thumbnail = saved(Image.fromarray(scene()), "TIFF", tiffinfo={254: 1})

    assert error_code(thumbnail) == "unsupported_format"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF", "HEIF", "TIFF", "GIF", "BMP", "JPEG2000"])
def test_the_pixel_limit_is_checked_before_decoding(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(Image.new("RGB", (200, 100)), kind)
    with Image.open(io.BytesIO(data)) as image:
        monkeypatch.setattr(type(image), "load", lambda *_: pytest.fail("Pillow decodes the image"))
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("simplejpeg decodes the image"))

    assert error_code(data, limits=Limits(max_pixels=19_999)) == "too_many_pixels"


def test_an_image_at_the_pixel_limit_passes() -> None:
    assert decoded(saved(Image.new("RGB", (200, 100)), "PNG"), limits=Limits(max_pixels=20_000)).rgb.shape[0] == 100


def test_a_decompression_bomb_is_refused_from_its_header() -> None:
    data = bytearray(saved(Image.new("1", (8, 8)), "PNG"))
    data[16:24] = struct.pack(">II", 30_000, 30_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))

    assert error_code(bytes(data)) == "too_many_pixels"


def test_the_byte_limit_is_checked() -> None:
    assert error_code(saved(Image.fromarray(scene()), "PNG"), limits=Limits(max_bytes=100)) == "too_many_bytes"


def test_only_artist_and_copyright_are_read_from_exif() -> None:
    exif = Image.Exif()
    exif[0x013B], exif[0x8298], exif[0x0110] = "A. Turner", "(c) 2024 A. Turner", "a camera"

    image = decoded(saved(Image.fromarray(scene()), "JPEG", exif=exif))

    assert image.credit == (("artist", "A. Turner"), ("copyright", "(c) 2024 A. Turner"))


def test_damaged_bytes_give_a_content_error_or_an_image() -> None:
    random = np.random.default_rng(7)
    small = Image.fromarray(scene())
    files = [saved(small, kind, **options) for kind, options in [*EXACT, *CLOSE, ("GIF", {})]]

    for data in files:
        for _ in range(12):
            broken = bytearray(data)
            for at in random.integers(0, len(broken), 4):
                broken[at] = random.integers(0, 256)
            try:
                image = decoded(bytes(broken), limits=Limits(max_pixels=10_000_000))
            except ContentError:
                continue
            assert image.rgb.dtype == np.uint8 and image.rgb.ndim == 3


@pytest.mark.skipif(not HARD.is_dir(), reason="no collection of hard files in CUTFLEET_TEST_DATA")
@pytest.mark.filterwarnings("ignore::UserWarning")  # from Pillow, for damaged EXIF
def test_each_hard_file_has_the_result_of_its_manifest() -> None:
    with open(HARD / "manifest.csv", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))

    for row in rows:
        try:
            decoded((HARD / row["file"]).read_bytes())
            result = "processed"
        except ContentError:
            result = "clear error"
        assert result in row["expected"], row["file"]
    assert len(rows) > 90
