"""Convert colour spaces of cameras, phones and presses to sRGB; compare with littleCMS and published formulas."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from tests.support import icc_profiles as icc
from workers.imaging.decode import Limits, decode_image
from workers.imaging.pixels import Pixels

TOLERANCE = 3
"""Grey levels."""


def every_colour(channels: int, *, levels: int) -> Pixels:
    """All combinations of `levels` values per channel, in an image 512 pixels wide."""
    steps = np.linspace(0, 255, levels).round().astype(np.uint8)
    mixtures = np.stack(np.meshgrid(*[steps] * channels, indexing="ij"), axis=-1).reshape(-1, channels)
    rows = -(-len(mixtures) // 512)
    return np.resize(mixtures, (rows, 512, channels))


def saved(pixels: Pixels, kind: str, profile: bytes, **options: Any) -> bytes:
    out = io.BytesIO()
    image = Image.frombytes("CMYK" if pixels.shape[2] == 4 else "RGB", pixels.shape[1::-1], pixels.tobytes())
    image.save(out, kind, icc_profile=profile, **options)
    return out.getvalue()


def decoded(data: bytes) -> Pixels:
    image = decode_image(data, limits=Limits(), animation="first")
    assert image.notes == (), "the profile is not ignored"
    return image.rgb


def by_littlecms(data: bytes, profile: bytes) -> Pixels:
    """Convert the pixels that Pillow decodes."""
    with Image.open(io.BytesIO(data)) as image:
        converted = ImageCms.profileToProfile(
            image, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    assert converted is not None
    return np.asarray(converted)


def difference(one: NDArray[Any], other: NDArray[Any]) -> float:
    return float(np.abs(one.astype(float) - other.astype(float)).max())


RGB_FILES = [
    ("PNG", {}),
    ("TIFF", {}),
    ("JPEG", {"quality": 95}),
    ("WEBP", {"lossless": True}),
    ("HEIF", {"quality": 90}),
    ("AVIF", {"quality": 90}),
]


@pytest.mark.parametrize(("kind", "options"), RGB_FILES)
@pytest.mark.parametrize("profile", [icc.display_p3, icc.adobe_rgb])
def test_display_p3_and_adobe_rgb_are_converted_as_by_littlecms(
    profile: Callable[[], bytes], kind: str, options: dict[str, Any]
) -> None:
    pixels = every_colour(3, levels=33)
    data = saved(pixels, kind, profile(), **options)

    ours = decoded(data)

    assert difference(ours, by_littlecms(data, profile())) <= TOLERANCE
    assert difference(ours, pixels) > 20, "the profile changes the colours"


def test_display_p3_and_adobe_rgb_are_converted_as_by_their_specifications() -> None:
    pixels = every_colour(3, levels=33)
    p3 = icc.to_srgb(icc.srgb_to_linear(pixels / 255), icc.DISPLAY_P3)
    adobe = icc.to_srgb((pixels / 255) ** icc.ADOBE_GAMMA, icc.ADOBE_RGB)

    assert difference(decoded(saved(pixels, "PNG", icc.display_p3())), p3) <= TOLERANCE
    assert difference(decoded(saved(pixels, "PNG", icc.adobe_rgb())), adobe) <= TOLERANCE


@pytest.mark.parametrize(("kind", "options"), [("TIFF", {}), ("JPEG", {"quality": 95})])
def test_cmyk_with_a_profile_is_converted_as_by_littlecms(kind: str, options: dict[str, Any]) -> None:
    data = saved(every_colour(4, levels=17), kind, icc.cmyk_press(), **options)

    ours = decoded(data)

    assert difference(ours, by_littlecms(data, icc.cmyk_press())) <= TOLERANCE
    with Image.open(io.BytesIO(data)) as image:
        assert difference(ours, np.asarray(image.convert("RGB"))) > 50, "Pillow's conversion without a profile differs"


def test_cmyk_inks_have_the_colours_of_the_press() -> None:
    inks = np.zeros((8, 8, 4), np.uint8)
    inks[:4, :4] = (0, 255, 255, 0)
    inks[4:, 4:] = (0, 0, 0, 255)

    rgb = decoded(saved(inks, "TIFF", icc.cmyk_press())).astype(int)

    assert rgb[0, 7].min() >= 252, "paper is white"
    assert rgb[0, 0, 0] > 200 and rgb[0, 0, 1:].max() < 110, "magenta and yellow are red"
    assert rgb[7, 7].max() < 80, "black is as dark as this press prints it"


def test_the_profile_of_a_transparent_image_is_applied() -> None:
    pixels = every_colour(3, levels=17)
    image = Image.fromarray(pixels)
    image.putalpha(Image.fromarray(np.resize(np.arange(256, dtype=np.uint8), pixels.shape[:2])))
    out = io.BytesIO()
    image.save(out, "PNG", icc_profile=icc.display_p3())

    decoded = decode_image(out.getvalue(), limits=Limits(), animation="first")

    expected = icc.to_srgb(icc.srgb_to_linear(pixels / 255), icc.DISPLAY_P3)
    assert difference(decoded.rgb, expected) <= TOLERANCE
    assert decoded.alpha is not None
