"""Any supported image file as uint8 RGB; scan, pack and predict share it.

What decoding decides, whatever the content:

- The format is read from the first bytes, never from the name; only JPEG, PNG, TIFF, BMP, WebP and DICOM are
  tried.
- Alpha and transparency are dropped, the colour below is kept: a composite would invent a background, and
  NVIDIA DALI drops it too. Grey is repeated to three channels. ICC profiles and gamma are ignored.
- 16 bits become 8 by dropping the low byte (0-65535 to 0-255), 12 bits by dropping four: never stretched.
- CMYK and YCCK JPEGs are read as Adobe writes them (inverted) and turned into RGB without a profile.
- EXIF orientation is applied. Files with several pages or frames are refused.
- DICOM goes through `noisyssl.dicom`, which says what it decides.
"""

import io
import os
import stat
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from noisyssl.errors import DataError, MachineError
from noisyssl.formats import NATIVE, announced, fault, is_dicom, tiff_tag

T = TypeVar("T")

MAX_PIXELS = 100_000_000
"""Larger images are refused from the header, before any pixel is decoded."""
MAX_BYTES = 1 << 30
"""Larger files are refused before they are read: 100 megapixels of 16-bit RGBA take 800 MB."""

# Opened by class rather than by Image.open, whose bomb check is a process-wide setting and a warning.
READERS: dict[str, type[ImageFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "TIFF": TiffImageFile,
    "BMP": BmpImageFile,
    "WebP": WebPImageFile,
}
SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", *SIXTEEN)
REFUSED = {"F": "has float pixels", "I": "has signed or 32-bit pixels"}
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to what undoes it."""
ORIENTATION = 274

# Once, at import: catch_warnings is not safe in threads, and every complaint that matters is raised below.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImage(DataError):
    """A file that is no supported, whole image; the message is `<path>: <reason>`, for bytes the reason."""


@dataclass(frozen=True)
class Header:
    """What is known of an image before its pixels are decoded."""

    format: str
    """JPEG, PNG, TIFF, BMP, WebP or DICOM."""
    mode: str
    """Pillow's mode of the stored pixels, such as RGB, L, I;16, CMYK; DICOM's photometric interpretation."""
    width: int
    """Pixels, after orientation."""
    height: int
    """Pixels, after orientation."""
    native: bool
    """NVIDIA DALI's CPU decoder gives the pixels of `decode` (mean difference at most 1/255)."""


def read(path: Path | str) -> bytes:
    """The bytes of one file.

    Raises:
        BadImage: it is missing, a directory, a dangling link, unreadable or over MAX_BYTES.
    """
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise BadImage(f"{path}: is a directory")
        if not stat.S_ISREG(status.st_mode):
            raise BadImage(f"{path}: is not a regular file")
        if status.st_size > MAX_BYTES:
            raise BadImage(f"{path}: has {status.st_size:,} bytes; at most {MAX_BYTES:,} are supported")
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        reason = "is a link to a missing file" if os.path.islink(path) else "does not exist"
    except PermissionError:
        reason = "permission denied"
    except OSError as error:
        reason = f"cannot be read ({error.strerror or error})"
    except ValueError:
        reason = "is not a valid path"
    raise BadImage(f"{path}: {reason}") from None


def decode(source: Path | str | bytes) -> np.ndarray:
    """(H, W, 3) uint8 RGB, writable and contiguous.

    Raises:
        BadImage: anything that is not one whole image of a supported kind.
        MachineError: a DICOM file, and what reads it is not installed.
    """
    return _explained(source, _pixels)


def header(source: Path | str | bytes) -> Header:
    """Format, mode and size from the header alone; a whole header does not promise whole pixels.

    Raises:
        BadImage: no supported header, more than MAX_PIXELS, several pages, unsupported pixels.
    """
    return _explained(source, _header)


def patient(data: bytes) -> bytes:
    """8 bytes that tell the patients of DICOM files apart; nothing for other files."""
    if not is_dicom(data):
        return b""
    from noisyssl import dicom

    return dicom.patient(data)


def _explained(source: Path | str | bytes, task: Callable[[bytes], T]) -> T:
    """`task` of the bytes; every exception becomes a BadImage with the path in front."""
    data = source if isinstance(source, bytes) else read(source)
    try:
        return task(data)
    except BadImage as error:
        reason = str(error)
    except MachineError:
        raise
    except MemoryError:
        reason = "needs more memory than there is"
    except Exception as error:  # Pillow raises a dozen kinds, SyntaxError and struct.error among them
        if is_dicom(data):  # no words of the error: they may quote the file, and so name a patient
            name, words = "DICOM file", ""
        else:
            name, words = _format(data), f" ({_words(error)})"
        reason = f"is a truncated {name}" if _is_cut(error) else f"is a broken {name}{words}"
    raise BadImage(reason if isinstance(source, bytes) else f"{source}: {reason}") from None


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:100] or type(error).__name__


def _is_cut(error: Exception) -> bool:
    words = ("truncated", "out of range", "unpack")
    return isinstance(error, EOFError) or any(word in str(error).lower() for word in words)


def _format(data: bytes) -> str:
    """The supported format the first bytes announce."""
    name = announced(data)
    if name in READERS:
        return name
    if not data:
        raise BadImage("is empty")
    if name in ("HTML", "text"):
        raise BadImage(f"is {name}, not an image")
    raise BadImage(f"is {name or 'no image of a known format'}; supported are {', '.join(READERS)}, DICOM")


def _open(data: bytes) -> tuple[str, ImageFile]:
    """Format and an image whose header is sound and whose pixels are not decoded yet."""
    name = _format(data)
    reader = READERS[name]
    image = reader.__new__(reader)  # kept in hand: what was parsed before an error tells which error it is
    try:
        image.__init__(io.BytesIO(data))  # type: ignore[misc]
    except MemoryError:
        raise
    except Exception as error:  # SyntaxError, struct.error, OSError, ValueError, TypeError and more
        raise BadImage(_header_fault(name, data, image, error)) from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImage(f"has {width} x {height} pixels; at most {MAX_PIXELS:,} are supported")
    if (pages := getattr(image, "n_frames", 1)) > 1:
        raise BadImage(f"has {pages} pages or frames; only single images are supported")
    if image.mode not in MODES:
        what = REFUSED.get(image.mode, f"has colour mode {image.mode}")
        raise BadImage(f"{what}; 8 or 16 bits of grey or colour are supported")
    if name == "TIFF" and [tiff_tag(image, tag, 1) for tag in (258, 259, 284)] == [16, 1, 2]:
        # Pillow 13 reads these planes as 8 bits wide, without an error
        raise BadImage("has separate uncompressed 16-bit planes; save it interleaved or compressed")
    image.info.pop("xmp", None)  # Pillow would turn a TIFF by it
    return name, image


def _header_fault(name: str, data: bytes, image: ImageFile, error: Exception) -> str:
    """Why `image` could not be opened."""
    size, words = getattr(image, "_size", (0, 0)), _words(error)
    if getattr(image, "_mode", "") and 0 in size:
        return f"has no pixels ({size[0]} x {size[1]})"
    if isinstance(error, Image.DecompressionBombError):  # Pillow's own check, in WebP only
        return f"has too many pixels; at most {MAX_PIXELS:,} are supported"
    if "unknown pixel mode" in words:
        return f"is a {name} with an unsupported pixel layout"
    if name == "TIFF":
        return f"has a broken TIFF directory ({words})"
    if _is_cut(error):
        return f"is a truncated {name}"
    words = words.replace("not identified by this driver", "no image size")
    return fault(name, data) or f"has a broken {name} header ({words})"


def _orientation(name: str, image: ImageFile) -> int:
    """EXIF orientation still to be undone; Pillow turns a TIFF by itself."""
    if name == "TIFF" or not image.info.get("exif"):
        return 1
    exif = Image.Exif()
    try:
        exif.load(image.info["exif"])
        return int(exif.get(ORIENTATION, 1))
    except Exception:
        return 1  # broken EXIF says nothing about the pixels


def _pixels(data: bytes) -> np.ndarray:
    if is_dicom(data):
        from noisyssl import dicom  # it needs what is above, and a package that not everybody has

        return dicom.decode(data)
    name, image = _open(data)
    if reason := fault(name, data):
        raise BadImage(reason)
    turn = TURNS.get(_orientation(name, image))
    upright: Image.Image = image if turn is None else image.transpose(turn)
    if image.mode in SIXTEEN:
        bits = tiff_tag(image, 258, 16) if name == "TIFF" else 16
        grey = (np.asarray(upright) >> (bits - 8)).astype(np.uint8)
        if name == "TIFF" and tiff_tag(image, 262, 1) == 0:  # white is zero; Pillow inverts 8 bits only
            grey = ~grey
        return np.repeat(grey[..., None], 3, axis=2)
    if upright.mode == "La":
        upright = upright.convert("LA")
    return np.array(upright if upright.mode == "RGB" else upright.convert("RGB"))


def _header(data: bytes) -> Header:
    if is_dicom(data):
        from noisyssl import dicom

        return dicom.header(data)
    name, image = _open(data)
    width, height = image.size
    if _orientation(name, image) in (5, 6, 7, 8):
        width, height = height, width
    return Header(name, image.mode, width, height, NATIVE[name](image, data))
