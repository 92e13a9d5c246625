"""Folders of images of every supported kind, and of every kind of broken file, for tests and benchmarks."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

Encode = Callable[[np.ndarray], bytes]


def paint(size: int, seed: int) -> np.ndarray:
    """(size, size + size // 8, 3) uint8: smooth waves, different for every seed."""
    rng = np.random.default_rng(seed)
    y, x = np.arange(size) / size, np.arange(size + size // 8) / size
    image = np.empty((len(y), len(x), 3), np.uint8)
    for channel in range(3):
        a, b = rng.uniform(3, 20, 2)
        p, q = rng.uniform(0, 2 * np.pi, 2)
        image[..., channel] = np.rint(127.5 + 127.5 * np.outer(np.sin(a * y + p), np.sin(b * x + q)))
    return image


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _pillow(kind: str, mode: str = "RGB", **options: Any) -> Encode:
    """Saves in `mode`; an alpha channel is the image's own red."""

    def encode(rgb: np.ndarray) -> bytes:
        image = Image.fromarray(rgb)
        if mode in ("LA", "RGBA"):
            image = image.convert(mode)
            image.putalpha(Image.fromarray(rgb[..., 0]))
        elif mode == "I;16":
            image = Image.fromarray(_deep(rgb)[..., 1])
        return _saved(image if image.mode == mode else image.convert(mode), kind, **options)

    return encode


def _turned(kind: str, orientation: int, **options: Any) -> Encode:
    def encode(rgb: np.ndarray) -> bytes:
        exif = Image.Exif()
        exif[274] = orientation
        return _saved(Image.fromarray(rgb), kind, exif=exif.tobytes(), **options)

    return encode


def _deep(rgb: np.ndarray) -> np.ndarray:
    """16 bits whose low byte is not the high one."""
    return rgb.astype(np.uint16) * 256 + rgb[::-1]


PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Adam7 of the PNG standard: first column, first row, steps."""


def png(pixels: np.ndarray, interlaced: bool = False) -> bytes:
    """A PNG of (H, W) or (H, W, 2 | 3 | 4) uint8 or uint16; Pillow writes neither Adam7 nor 16-bit colour."""
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    height, width, channels = pixels.shape
    big = pixels.astype(f">u{pixels.itemsize}")
    passes = PASSES if interlaced else ((0, 0, 1, 1),)
    parts = [big[y0::dy, x0::dx] for x0, y0, dx, dy in passes]
    rows = b"".join(b"\0" + row.tobytes() for part in parts if part.size for row in part)
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    return png_file(width, height, 8 * pixels.itemsize, colour, zlib.compress(rows, 1), interlaced)


def png_file(width: int, height: int, bits: int, colour: int, data: bytes, interlaced: bool = False) -> bytes:
    """Signature, header, `data` as the only pixel chunk, end; only the checksums are sure to be right."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, int(interlaced))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff(pixels: np.ndarray, order: str = "<", tags: dict[int, int] | None = None) -> bytes:
    """An uncompressed TIFF of (H, W) or (H, W, C) uint8 or uint16 in one strip; `tags` replace or add."""
    height, width = pixels.shape[:2]
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    data = pixels.astype(f"{order}u{pixels.itemsize}").tobytes()
    data += b"\0" * (len(data) % 2)
    entries: dict[int, int] = {
        256: width, 257: height, 258: 8 * pixels.itemsize, 259: 1, 262: 2 if channels >= 3 else 1,
        273: 8, 277: channels, 278: height, 279: len(data), **(tags or {}),
    }  # fmt: skip
    # BitsPerSample has one value per channel; more than two do not fit into the entry
    directory = 8 + len(data)
    beyond = directory + 2 + 12 * len(entries) + 4
    body = struct.pack(order + "H", len(entries))
    for tag, value in sorted(entries.items()):
        if tag == 258 and channels > 2:
            body += struct.pack(order + "HHII", tag, 3, channels, beyond)
        elif tag in (256, 257, 273, 278, 279):
            body += struct.pack(order + "HHII", tag, 4, 1, value)
        else:
            count = channels if tag == 258 else 1
            body += struct.pack(order + "HHIHH", tag, 3, count, value, value if count == 2 else 0)
    body += struct.pack(order + "I", 0) + struct.pack(order + "H", entries[258]) * channels
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(order + "I", directory) + data + body


def _bmp(bits: int) -> Encode:
    """BMP of 32 bits with an unused fourth byte, or of 24 bits from the top down."""

    def encode(rgb: np.ndarray) -> bytes:
        height, width = rgb.shape[:2]
        bgr = rgb[..., ::-1] if bits == 24 else np.dstack([rgb[..., ::-1], rgb[..., :1]])
        rows = np.zeros((height, -(-width * bits // 32) * 4), np.uint8)
        rows[:, : width * bits // 8] = bgr.reshape(height, -1)
        head = struct.pack("<IiiHHIIiiII", 40, width, -height, 1, bits, 0, rows.size, 2835, 2835, 0, 0)
        return b"BM" + struct.pack("<IHHI", 54 + rows.size, 0, 0, 54) + head + rows.tobytes()

    return encode


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
FAST: dict[str, Any] = {"compress_level": 1}
KINDS: dict[str, tuple[str, Encode]] = {
    "JPEG 4:4:4": ("jpg", _pillow("JPEG", quality=92, subsampling=0)),
    "JPEG 4:2:2": ("jpeg", _pillow("JPEG", quality=85, subsampling=1)),
    "JPEG 4:2:0": ("JPG", _pillow("JPEG", quality=75, subsampling=2)),
    "JPEG progressive": ("jpg", _pillow("JPEG", quality=90, progressive=True)),
    "JPEG RGB": ("jpg", _pillow("JPEG", quality=90, keep_rgb=True)),
    "JPEG profile": ("jpg", _pillow("JPEG", quality=90, icc_profile=PROFILE)),
    "JPEG grey": ("jpg", _pillow("JPEG", "L", quality=90)),
    "JPEG CMYK": ("jpg", _pillow("JPEG", "CMYK", quality=95)),
    **{f"JPEG turned {i}": ("jpg", _turned("JPEG", i, quality=90)) for i in range(2, 9)},
    "PNG RGB": ("png", _pillow("PNG", **FAST)),
    "PNG RGBA": ("png", _pillow("PNG", "RGBA", **FAST)),
    "PNG grey": ("png", _pillow("PNG", "L", **FAST)),
    "PNG grey alpha": ("png", _pillow("PNG", "LA", **FAST)),
    "PNG palette": ("png", _pillow("PNG", "P", **FAST)),
    "PNG palette transparent": ("png", _pillow("PNG", "P", transparency=3, **FAST)),
    "PNG grey transparent": ("png", _pillow("PNG", "L", transparency=3, **FAST)),
    "PNG 1 bit": ("png", _pillow("PNG", "1", **FAST)),
    "PNG grey 16": ("png", _pillow("PNG", "I;16", **FAST)),
    "PNG grey alpha 16": ("png", lambda rgb: png(_deep(rgb)[..., :2])),
    "PNG RGB 16": ("png", lambda rgb: png(_deep(rgb))),
    "PNG RGBA 16": ("png", lambda rgb: png(np.dstack([_deep(rgb), _deep(rgb)[..., 0]]))),
    "PNG interlaced": ("png", lambda rgb: png(rgb, interlaced=True)),
    "PNG grey 16 interlaced": ("png", lambda rgb: png(_deep(rgb)[..., 0], interlaced=True)),
    "PNG turned": ("png", _turned("PNG", 6, **FAST)),
    "PNG profile": ("png", _pillow("PNG", icc_profile=PROFILE, **FAST)),
    "TIFF RGB": ("tif", _pillow("TIFF")),
    "TIFF grey": ("tiff", _pillow("TIFF", "L")),
    "TIFF LZW": ("tif", _pillow("TIFF", compression="tiff_lzw")),
    "TIFF LZW predictor": ("tif", _pillow("TIFF", compression="tiff_lzw", tiffinfo={317: 2})),
    "TIFF deflate": ("tif", _pillow("TIFF", compression="tiff_adobe_deflate")),
    "TIFF grey LZW": ("tif", _pillow("TIFF", "L", compression="tiff_lzw")),
    "TIFF PackBits": ("tif", _pillow("TIFF", compression="packbits")),
    "TIFF JPEG": ("tif", _pillow("TIFF", compression="jpeg")),
    "TIFF grey 16": ("tif", _pillow("TIFF", "I;16")),
    "TIFF grey 16 deflate": ("tif", _pillow("TIFF", "I;16", compression="tiff_adobe_deflate")),
    "TIFF grey 16 big-endian": ("tif", lambda rgb: tiff(_deep(rgb)[..., 1], ">")),
    "TIFF grey 16 white is zero": ("tif", lambda rgb: tiff(~_deep(rgb)[..., 1], tags={262: 0})),
    "TIFF grey white is zero": ("tif", lambda rgb: tiff(~rgb[..., 1], tags={262: 0})),
    "TIFF RGB big-endian": ("tif", lambda rgb: tiff(rgb, ">")),
    "TIFF RGB 16": ("tif", lambda rgb: tiff(_deep(rgb))),
    "TIFF RGB 16 big-endian": ("tif", lambda rgb: tiff(_deep(rgb), ">")),
    "TIFF RGBA": ("tif", _pillow("TIFF", "RGBA")),
    "TIFF grey alpha": ("tif", _pillow("TIFF", "LA")),
    "TIFF palette": ("tif", _pillow("TIFF", "P")),
    "TIFF CMYK": ("tif", _pillow("TIFF", "CMYK")),
    "TIFF YCbCr": ("tif", _pillow("TIFF", "YCbCr")),
    "TIFF 1 bit": ("tif", _pillow("TIFF", "1")),
    "TIFF 1 bit fax": ("tif", _pillow("TIFF", "1", compression="group4")),
    "TIFF turned": ("tif", lambda rgb: tiff(rgb, tags={274: 6})),
    "TIFF big": ("tif", _pillow("TIFF", big_tiff=True)),
    "BMP RGB": ("bmp", _pillow("BMP")),
    "BMP grey": ("bmp", _pillow("BMP", "L")),
    "BMP palette": ("bmp", _pillow("BMP", "P")),
    "BMP 1 bit": ("bmp", _pillow("BMP", "1")),
    "BMP from the top": ("bmp", _bmp(24)),
    "BMP 32": ("bmp", _bmp(32)),
    "WebP lossy": ("webp", _pillow("WEBP", quality=80, method=0)),
    "WebP lossless": ("webp", _pillow("WEBP", lossless=True, quality=0, method=0)),
    "WebP RGBA": ("webp", _pillow("WEBP", "RGBA", quality=80, method=0)),
    "WebP RGBA lossless": ("webp", _pillow("WEBP", "RGBA", lossless=True, exact=True, quality=0, method=0)),
    "WebP turned": ("webp", _turned("WEBP", 6, quality=80, method=0)),
    "PNG named .jpg": ("jpg", _pillow("PNG", **FAST)),
}
"""Every supported kind: a file ending, and `paint` to the bytes of a file."""

REASONS = {
    "empty": "is empty",
    "truncated JPEG": "is a truncated JPEG",
    "truncated PNG": "is a truncated PNG",
    "garbage": "is no image of a known format",
    "HTML named .jpg": "is HTML, not an image",
    "text named .png": "is text, not an image",
    "unsupported content": "is GIF; supported are JPEG, PNG, TIFF, BMP, WebP",
    "zero-sized": "has no pixels (",
    "decompression bomb": "at most 100,000,000 are supported",
    "broken TIFF directory": "has a broken TIFF directory (",
    "directory": "is a directory",
    "dangling link": "is a link to a missing file",
}
"""What the reason of `noisyssl.images.BadImage` contains for each broken kind."""


def good(folder: Path, count: int, size: int = 224, seed: int = 0) -> dict[str, str]:
    """Relative path to kind of `count` images written below `folder`, the kinds in turn, no two alike."""
    folder.mkdir(parents=True, exist_ok=True)
    names, kinds = {}, list(KINDS)
    for i in range(count):
        kind = kinds[i % len(kinds)]
        suffix, encode = KINDS[kind]
        name = f"{i:06d}.{suffix}"
        (folder / name).write_bytes(encode(paint(size, seed * 1_000_003 + i)))
        names[name] = kind
    return names


def bad(folder: Path, each: int = 10, seed: int = 0) -> dict[str, str]:
    """Relative path to kind of `each` broken files of every kind in REASONS written below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    names = {}
    for kind in REASONS:
        for i in range(each):
            suffix, content = _broken(kind, i, rng)
            name = f"{kind.replace(' ', '-').replace('.', '')}-{i}.{suffix}"
            if kind == "directory":
                (folder / name).mkdir()
            elif kind == "dangling link":
                (folder / name).symlink_to(f"missing-{i}.{suffix}")
            else:
                (folder / name).write_bytes(content)
            names[name] = kind
    return names


def _broken(kind: str, i: int, rng: np.random.Generator) -> tuple[str, bytes]:
    """File ending and content of the i-th broken file of one kind."""
    rgb = paint(64, int(rng.integers(1 << 31)))
    if kind == "truncated JPEG":
        whole = list(KINDS.values())[i % 8][1](rgb)
        return "jpg", whole[: int(len(whole) * rng.uniform(0.3, 0.98))]
    if kind == "truncated PNG":
        whole = _pillow("PNG", ("RGB", "L", "P")[i % 3])(rgb)
        return "png", whole[: int(len(whole) * rng.uniform(0.2, 0.99))]
    if kind == "garbage":
        return ("jpg", "png", "tif")[i % 3], b"\x13" + rng.bytes(2000)
    if kind == "HTML named .jpg":
        return "jpg", b"\n<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head></html>\n"
    if kind == "text named .png":
        return "png", f"patient {i}: image on request, not available here; see the archive\n".encode()
    if kind == "unsupported content":
        return ("jpg", "png", "tif")[i % 3], _saved(Image.fromarray(rgb), "GIF")
    if kind == "zero-sized":
        jpeg = KINDS["JPEG 4:4:4"][1](rgb)
        return (
            ("png", png_file(0, 64, 8, 2, zlib.compress(b""))),
            ("tif", tiff(rgb, tags={257: 0})),
            ("jpg", jpeg[: (at := jpeg.index(b"\xff\xc0") + 5)] + b"\0\0" + jpeg[at + 2 :]),
            ("bmp", _bmp(24)(rgb[:, :0])),
        )[i % 4]
    if kind == "decompression bomb":
        jpeg = KINDS["JPEG 4:4:4"][1](rgb)
        side = 12_000  # one bit a pixel: 18 MB of rows in 18 kB
        return (
            ("png", png_file(side, side, 1, 0, zlib.compress(b"\0" * (side // 8 + 1) * side, 1))),
            ("jpg", jpeg[: (at := jpeg.index(b"\xff\xc0") + 5)] + b"\xff\xf0\xff\xf0" + jpeg[at + 4 :]),
            ("tif", tiff(rgb, tags={256: 1_000_000, 257: 1_000_000})),
        )[i % 3]
    if kind == "broken TIFF directory":
        whole = tiff(rgb)
        return "tif", (
            whole[:4] + struct.pack("<I", len(whole) + 1000) + whole[8:],
            whole[: len(whole) - int(rng.integers(40, 90))],
            whole[:4] + struct.pack("<I", 9) + whole[8:],
        )[i % 3]
    return ("jpg", "png", "tif")[i % 3], b""
