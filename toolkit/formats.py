"""What is known of an image file before its pixels are decoded: the format it announces, whether its parts
follow each other, and whether NVIDIA DALI would give the same pixels as Pillow.
"""

import codecs
import os
import re
import struct
import zlib
from collections.abc import Callable
from typing import Any

from PIL.ImageFile import ImageFile

SUFFIXES: frozenset[str] = frozenset(
    {
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".tif",
        ".tiff",
        ".bmp",
        ".dib",
        ".webp",
        ".dcm",
        ".dicom",
        ".ima",
    }
)
"""Lower-case endings that a folder scan takes for an image; what is inside decides."""
MASKS = re.compile(r"(^|[ _-])masks?$", re.IGNORECASE)
"""Names of folders of segmentations, which are no images where they lie beside a folder `images`."""
SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (128, b"DICM", "DICOM"),  # first: its preamble may be the header of a TIFF
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "TIFF"),
    (0, b"MM\0+", "TIFF"),
    (0, b"BM", "BMP"),
    (8, b"WEBP", "WebP"),
    (0, b"GIF8", "GIF"),
    (0, b"%PDF", "PDF"),
    (0, b"%!PS", "PostScript"),
    (0, b"\xc5\xd0\xd3\xc6", "PostScript"),
    (0, b"8BPS", "Photoshop"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftypmif1", "HEIC"),
    (0, b"\2\0\0\0UL\4\0", "DICOM"),  # old files begin without a preamble, or without all of the file meta
    (0, b"\x08\0\0\0", "DICOM"),
    (0, b"\x08\0\5\0", "DICOM"),
    (0, b"\x08\0\x08\0", "DICOM"),
    (0, b"\x08\0\x12\0", "DICOM"),
    (0, b"\x08\0\x16\0", "DICOM"),
    (0, b"\x89HDF", "HDF5"),
    (0, b"\x93NUMPY", "NumPy"),
    (0, b"PK\3\4", "ZIP"),
    (0, b"\x1f\x8b", "gzip"),
)
"""(offset, bytes, format); the unsupported ones are here to be named in the reason."""


def announced(data: bytes) -> str:
    """The format that the first bytes announce; "HTML", "text" or nothing where they announce no image."""
    for offset, signature, name in SIGNATURES:
        if data.startswith(signature, offset) and not (name == "BMP" and _text(data)):
            return name
    text = _text(data).lower()
    if text.startswith(("<!doctype html", "<html", "<head", "<body")):
        return "HTML"
    return "text" if text else ""


def is_image_name(path: str) -> bool:
    """Whether a folder scan takes this file for an image: by its ending, or, named by a UID or by nothing as
    archives do, because it begins as DICOM.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix in SUFFIXES:
        return True
    if (
        suffix.strip(".0123456789")
        or os.path.basename(path).upper() == "DICOMDIR"
        or not os.path.isfile(path)
    ):
        return False
    try:
        with open(path, "rb") as file:
            return is_dicom(file.read(132))
    except OSError:
        return False


def is_dicom(data: bytes) -> bool:
    """Whether the first 132 bytes announce a DICOM file."""
    return announced(data) == "DICOM"


def _text(data: bytes) -> str:
    """The beginning as text without leading space, or nothing where it is not UTF-8 text."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(data[:512])
    except UnicodeDecodeError:
        return ""
    return text.lstrip("\ufeff \t\r\n") if all(c.isprintable() or c.isspace() for c in text) else ""


def fault(name: str, data: bytes) -> str:
    """What the layout of a PNG or WebP shows to be wrong, or nothing; other formats tell while decoding."""
    if name == "WebP" and len(data) < 8 + int.from_bytes(data[4:8], "little"):
        return "is a truncated WebP"
    return _png_fault(data) if name == "PNG" else ""


def _png_fault(data: bytes) -> str:
    # Pillow skips checksums of pixel data and a missing end where it got enough rows; libpng does not
    position, kind = 8, b""
    while kind != b"IEND":
        if len(data) < position + 8:
            return "is a truncated PNG"
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if len(data) < end + 4:
            return "is a truncated PNG"
        (checksum,) = struct.unpack_from(">I", data, end)
        if zlib.crc32(memoryview(data)[position + 4 : end]) != checksum:
            return f"is a broken PNG (wrong checksum in the chunk at byte {position})"
        position = end + 4
    return ""


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether a JPEG is baseline or progressive (no arithmetic coding) and its segments follow without gaps.

    libjpeg skips stray bytes between segments; NVIDIA's parsers stop there.
    """
    position = 2
    while position + 4 <= len(data):
        lead, marker, length = struct.unpack_from(">BBH", data, position)
        if lead != 0xFF or marker < 0xC0 or 0xD0 <= marker <= 0xD9 or marker == 0xFF or length < 2:
            return False
        if 0xC0 <= marker <= 0xCF and marker not in (0xC0, 0xC1, 0xC2, 0xC4):
            return False
        if marker == 0xDA:  # start of scan: what follows is coded pixels
            return True
        position += 2 + length
    return False


def tiff_tag(image: ImageFile, tag: int, default: Any) -> Any:
    """The first value of a tag of an opened TIFF."""
    value = image.tag_v2.get(tag, default)  # type: ignore[attr-defined]
    return value[0] if isinstance(value, tuple) else value


TIFF_NATIVE: dict[int, tuple[int | None, ...]] = {
    258: (8, 16),  # bits
    259: (1, 5, 8, 32946),  # uncompressed, LZW, deflate
    262: (1, 2),  # black is zero, RGB; DALI reads white-is-zero wrong in 16 bits
    266: (None, 1),  # fill order
    274: (None, 1),  # orientation
    284: (None, 1),  # planes
    322: (None,),  # tiles
    338: (None,),  # extra samples: DALI reads grey with alpha wrong
    339: (None, 1),  # unsigned
}
"""Tag to the values that were compared with DALI; others differ, fail or were not tried."""

NATIVE: dict[str, Callable[[ImageFile, bytes], bool]] = {
    "JPEG": lambda image, data: image.mode in ("L", "RGB") and _is_plain_jpeg(data),
    "PNG": lambda image, data: b"eXIf" not in data,
    "TIFF": lambda image, data: all(
        tiff_tag(image, tag, None) in values for tag, values in TIFF_NATIVE.items()
    ),
    "BMP": lambda image, data: image.info.get("compression") == 0 and data[28] in (8, 24, 32),
    "WebP": lambda image, data: data[12:16] in (b"VP8 ", b"VP8L"),  # DALI fails on VP8X with EXIF
}
"""Whether DALI 2.4's CPU decoder gives the pixels of `images.decode`, by format, for a whole file: mean
difference at most 1/255. Everything doubtful counts as no."""
