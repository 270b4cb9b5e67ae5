"""Recognise an image format by its bytes, never by a file name, and open the file."""

from __future__ import annotations

import io
import re

import pillow_heif
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from jobs.errors import ContentError

ANIMATED = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")
"""Formats whose further images are frames or pages. In MPO and HEIF they are views, depth maps or thumbnails."""

SUPPORTED = "JPEG, PNG, WebP, AVIF, HEIC, TIFF, GIF, BMP and JPEG 2000"

_PLUGINS = (  # `Image.open` imports no plugin; each registers itself when it is imported
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # a worker decodes several images at once, one thread each

_MAGIC = (
    (re.compile(rb"\xff\xd8\xff"), "JPEG"),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "PNG"),
    (re.compile(rb"RIFF....WEBP", re.S), "WEBP"),
    (re.compile(rb"GIF8[79]a"), "GIF"),
    (re.compile(rb"BM.{4}\0\0\0\0", re.S), "BMP"),
    (re.compile(rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"), "JPEG2000"),
)
_UNSUPPORTED = (
    (re.compile(rb"II\*\0.{4}CR|IIRO|IIU\0|FUJIFILMCCD-RAW", re.S), "a camera's raw file"),
    (re.compile(rb".{4}ftypcrx ", re.S), "a camera's raw file"),
    (re.compile(rb"8BPS"), "a Photoshop file"),
    (re.compile(rb"\0\0[\1\2]\0.\0|\0\0[\1\2]\0..\0\0", re.S), "an icon"),
    (re.compile(rb"%PDF|%!PS|\xc5\xd0\xd3\xc6"), "PDF or PostScript"),
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "), "JPEG XL"),
    (
        re.compile(
            rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml.{0,1000}?)?(?:<!--.{0,1000}?-->\s*|<!DOCTYPE.{0,1000}?>\s*)*<svg",
            re.S | re.I,
        ),
        "SVG",
    ),
    (
        re.compile(rb"P[1-7]\s|#\?RADIANCE|v/1\x01|DDS |qoif|icns|SIMPLE  =|\x1f\x8b|IIMM"),
        "in a format that few programs read",
    ),
    (re.compile(rb".{4}ftyp", re.S), "a video or another media container"),
)
_WEB_PAGE = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html|head|body)\b", re.I)
_TIFF = re.compile(rb"II\*\0|MM\0\*|II\+\0|MM\0\+")
_HEIF_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1"}
_AVIF_BRANDS = {b"avif", b"avis"}
_REDUCED = 1
"""TIFF 6.0, NewSubfileType bit 0: a reduced version of another image in the file."""


def sniff_format(data: bytes) -> str:
    """Return Pillow's name of the format. Raises `ContentError`: `unsupported_format` for an image of a format that we
    don't read, else `not_an_image`.
    """
    head = data[:4096]
    for magic, kind in _MAGIC:
        if magic.match(head):
            return kind
    brands = _brands(head)
    if brands & _AVIF_BRANDS:
        return "AVIF"
    if brands & _HEIF_BRANDS:
        return "HEIF"
    for magic, description in _UNSUPPORTED:
        if magic.match(head):
            raise _unsupported(description)
    if _TIFF.match(head):
        return "TIFF"
    if data[-18:-2] == b"TRUEVISION-XFILE":
        raise _unsupported("a Targa file")
    raise ContentError(_describe_other(head, len(data)))


def open_image(data: bytes, kind: str) -> Image.Image:
    """Read the header. Raises `ContentError` (`unsupported_format`), and what Pillow raises."""
    image = Image.open(io.BytesIO(data), formats=(kind,))
    if kind == "TIFF" and image.tag_v2.get(254, 0) & _REDUCED:  # type: ignore[attr-defined]  # TIFF only
        raise _unsupported("a raw file whose first page is a thumbnail")
    return image


def is_truncated(data: bytes, kind: str) -> bool:
    """Whether the container declares more bytes than `data` has. False for a format that declares no size."""
    if kind == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if kind == "JPEG2000" and data.startswith(b"\xff\x4f"):
        return not data.endswith(b"\xff\xd9")
    if kind in ("AVIF", "HEIF", "JPEG2000"):
        return _box_end(data) > len(data)
    return False


def _describe_other(head: bytes, size_bytes: int) -> str:
    if not head:
        return "The file is empty: upload it again."
    if _WEB_PAGE.match(head):
        return "The file is a web page, probably from a failed download: fetch the image again."
    return f"The file is not an image: {size_bytes} bytes that begin with {bytes(head[:16])!r}."


def _unsupported(description: str) -> ContentError:
    return ContentError(f"The file is {description}. Supported formats: {SUPPORTED}.", code="unsupported_format")


def _brands(head: bytes) -> set[bytes]:
    """Return the major and the compatible brands (ISO/IEC 14496-12, 4.3)."""
    if head[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(head[:4], "big"), len(head))
    return {head[8:12]} | {head[at : at + 4] for at in range(16, end, 4)}


def _box_end(data: bytes) -> int:
    """Return where the last top-level box ends by its declared size; size 0 means that it ends with the file."""
    at = 0
    while 0 <= at <= len(data) - 8:
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if size < 8:
            return len(data)
        at += size
    return at
