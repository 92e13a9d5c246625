"""One DICOM image as uint8 RGB, as a viewer would show it; pydicom reads it, from bytes nobody vouches for.

Grey: stored values, modality LUT or rescale, VOI LUT or window (the first of each), MONOCHROME1 and inverse
presentation turned over: PS3.3 C.11.1, C.11.2, C.11.6. Without a VOI LUT or window, 8 bits are shown over all
they can hold; deeper pixels between the image's own smallest and largest value, padding left out. Colour:
palette, YBR and RGB become RGB; deeper than 8 bits, the low ones are dropped. Overlays, ICC profiles and the
aspect ratio of pixels are ignored.

A file with several frames is refused, as a TIFF with several pages is: which frame a label or an answer is
about, only its owner knows.

Names, dates and numbers of patients are not parsed (`TAGS`; `patient` is the exception), no text of a file is
repeated in a message, and pydicom's own warnings, which quote values, are silenced.
"""

import hashlib
import io
import logging
import warnings
import zlib
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from noisyssl import codestream, dicom_child
from noisyssl.errors import MachineError
from noisyssl.grey import shown
from noisyssl.images import MAX_PIXELS, BadImage, Header

MAX_INFLATED = 1 << 28
"""Bytes that a deflated file may unfold to."""
LONG = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
"""Value representations whose length takes four bytes."""
DEFLATED = b"1.2.840.10008.1.2.1.99"
TAGS = (
    "TransferSyntaxUID", "SOPClassUID", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PhotometricInterpretation",
    "PlanarConfiguration", "PixelPaddingValue", "PixelPaddingRangeLimit", "RescaleSlope",
    "RescaleIntercept", "ModalityLUTSequence", "VOILUTSequence", "VOILUTFunction", "WindowCenter",
    "WindowWidth", "PresentationLUTShape", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence", "ExtendedOffsetTable", "ExtendedOffsetTableLengths", "PixelData",
    *(
        f"{start}{colour}PaletteColorLookupTable{end}"
        for colour in ("Red", "Green", "Blue")
        for start, end in (("", "Descriptor"), ("", "Data"), ("Segmented", "Data"))
    ),
)  # fmt: skip
"""All that is parsed."""
GREY = ("MONOCHROME1", "MONOCHROME2")
PALETTE = "PALETTE COLOR"
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
DECODERS = {
    "1.2.840.10008.1.2.4.50": "pillow",  # JPEG baseline; GDCM ends the process on some broken files
    "1.2.840.10008.1.2.4.51": "gdcm",  # JPEG extended, of 8 bits
    "1.2.840.10008.1.2.4.57": "gdcm",  # JPEG lossless
    "1.2.840.10008.1.2.4.70": "gdcm",
    "1.2.840.10008.1.2.4.80": "pyjpegls",
    "1.2.840.10008.1.2.4.81": "pyjpegls",
    "1.2.840.10008.1.2.4.90": "pylibjpeg",  # OpenJPEG
    "1.2.840.10008.1.2.4.91": "pylibjpeg",
    "1.2.840.10008.1.2.5": "pydicom",  # RLE, 50 ms a megapixel; pylibjpeg's panics on some broken files
}
"""pydicom's plugin for a transfer syntax: the same pixels on every machine."""
JPEG_2000 = tuple(f"1.2.840.10008.1.2.4.{number}" for number in (90, 91, 201, 202, 203))
RLE = "1.2.840.10008.1.2.5"
EXTENDED = "1.2.840.10008.1.2.4.51"


def decode(data: bytes) -> np.ndarray:
    """(H, W, 3) uint8 RGB.

    Raises:
        BadImage: no DICOM file, no pixels, several frames, broken or of a kind that cannot be decoded.
        MachineError: pydicom is not installed.
    """
    dataset = _opened(data)
    pydicom = _pydicom()
    kind = dataset.PhotometricInterpretation
    _check_decoder(dataset)
    _check_codestream(dataset)
    with np.errstate(all="ignore"):
        outside = DECODERS.get(dataset.file_meta.TransferSyntaxUID) == "gdcm"
        stored = dicom_child.decoded(data) if outside else _decoded(dataset)
        if kind in GREY:
            return np.repeat(shown(stored, dataset)[..., None], 3, axis=2)
        bits = dataset.BitsStored
        if kind == PALETTE:
            stored = pydicom.pixels.apply_color_lut(stored, dataset)[..., :3]
            wide = int(dataset.RedPaletteColorLookupTableDescriptor[2]) > 8 or stored.max(initial=0) > 255
            bits = 16 if wide and stored.itemsize > 1 else 8  # some write 8-bit entries in words
        return np.ascontiguousarray(stored >> (bits - 8) if bits > 8 else stored).astype(np.uint8)


def header(data: bytes) -> Header:
    """What is known before the pixels are decoded.

    Raises:
        BadImage: as `decode`, as far as the header shows it.
    """
    dataset = _opened(data, pixels=False)
    return Header("DICOM", dataset.PhotometricInterpretation, dataset.Columns, dataset.Rows, native=False)


def patient(data: bytes) -> bytes:
    """8 bytes that tell one patient of a hospital from another; nothing where the file names none.

    The identifier itself is read for this alone and goes nowhere else.
    """
    try:
        dataset = _read(data, ("PatientID", "IssuerOfPatientID"), pixels=False)
        name = str(dataset.get("PatientID") or "").strip()
        issuer = str(dataset.get("IssuerOfPatientID") or "").strip()
    except Exception:  # an identifier that nobody can read identifies nobody
        return b""
    if not name:
        return b""
    return hashlib.blake2b(f"{issuer}\0{name}".encode(), digest_size=8).digest()


@cache
def _pydicom() -> ModuleType:
    try:
        import pydicom
        import pydicom.pixels
    except ImportError:
        raise MachineError(
            "DICOM files need pydicom, which is not installed; run pip install 'noisyssl[dicom]'."
        ) from None
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)  # its messages quote what the file says
    warnings.filterwarnings("ignore", module=r"pydicom\.")
    return pydicom


def _read(data: bytes, tags: tuple[str, ...], *, pixels: bool) -> Any:
    """The data set of a file, these tags of it."""
    pydicom = _pydicom()
    try:
        _check_inflated(data)
        dataset = pydicom.dcmread(
            io.BytesIO(data), force=True, specific_tags=list(tags), stop_before_pixels=not pixels
        )
        if dataset.file_meta.get("TransferSyntaxUID") is None:  # an old file without the part that says it
            implicit, little = dataset.original_encoding
            uid = pydicom.uid
            dataset.file_meta.TransferSyntaxUID = (
                uid.ImplicitVRLittleEndian
                if implicit
                else uid.ExplicitVRLittleEndian
                if little
                else uid.ExplicitVRBigEndian
            )
    except (BadImage, MemoryError):
        raise
    except Exception:  # pydicom raises a dozen kinds; their words may quote the file
        raise BadImage("is a broken DICOM file (its tags cannot be read)") from None
    return dataset


def _check_inflated(data: bytes) -> None:
    """Raises BadImage where a deflated file unfolds to more than MAX_INFLATED; pydicom would take it all."""
    at, syntax = 132 if data[128:132] == b"DICM" else 0, b""
    while data[at : at + 2] == b"\2\0" and at + 12 <= len(data):
        long = data[at + 4 : at + 6] in LONG
        head, size = (12, data[at + 8 : at + 12]) if long else (8, data[at + 6 : at + 8])
        value = data[at + head : at + head + int.from_bytes(size, "little")]
        if data[at + 2 : at + 4] == b"\x10\0":
            syntax = value.rstrip(b"\0 ")
        at += head + len(value)
    if syntax != DEFLATED:
        return
    unfold, total, block = zlib.decompressobj(-zlib.MAX_WBITS), 0, data[at:]
    while block and not unfold.eof:
        total += len(unfold.decompress(block, 1 << 22))
        block = unfold.unconsumed_tail
        if total > MAX_INFLATED:
            raise BadImage(f"unfolds to over {MAX_INFLATED:,} bytes")


def _opened(data: bytes, *, pixels: bool = True) -> Any:
    """A data set whose header makes sense and whose pixels are affordable.

    With `pixels` False only the header is looked at.
    """
    dataset = _read(data, TAGS, pixels=pixels)
    try:
        rows, columns = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
        frames, samples = int(dataset.get("NumberOfFrames") or 1), int(dataset.get("SamplesPerPixel") or 1)
        allocated = int(dataset.get("BitsAllocated") or 0)
        kind = str(dataset.get("PhotometricInterpretation"))
        stored = int(dataset.get("BitsStored") or allocated)
    except (TypeError, ValueError):
        raise BadImage("is a broken DICOM file (the description of its pixels is no number)") from None
    if not rows or not columns:
        raise BadImage("is a DICOM file without an image")
    if rows * columns > MAX_PIXELS:
        raise BadImage(f"has {columns} x {rows} pixels; at most {MAX_PIXELS:,} are supported")
    if frames > 1:
        raise BadImage(f"has {frames} frames; only single images are supported, save the one that counts")
    if kind not in (*GREY, PALETTE, *COLOUR) or samples != (3 if kind in COLOUR else 1):
        known = kind if kind in (*GREY, PALETTE, *COLOUR) else "an unknown photometric interpretation"
        raise BadImage(f"has {samples} samples a pixel and {known}; supported are grey, palette, RGB and YBR")
    if allocated not in (8, 16) or not 1 <= stored <= allocated:
        raise BadImage(f"has {stored} of {allocated} bits a pixel; 8 or 16 bits are supported")
    if (high := int(dataset.get("HighBit", stored - 1))) != stored - 1:
        raise BadImage(f"has {stored} bits a pixel that end at bit {high}; only those from bit 0 on are read")
    if dataset.get("SegmentedRedPaletteColorLookupTableData"):
        raise BadImage("has a segmented palette, which is not supported; store it as RGB")
    if pixels and not dataset.get("PixelData"):
        raise BadImage("is a DICOM file without pixels")
    dataset.BitsStored = stored
    return dataset


def _check_codestream(dataset: Any) -> None:
    """Raises BadImage where the coded image is not the size that the header says: decoders trust its own."""
    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated:
        return
    table, lengths = dataset.get("ExtendedOffsetTable"), dataset.get("ExtendedOffsetTableLengths")
    try:
        frame = _pydicom().encaps.get_frame(
            dataset.PixelData, 0, number_of_frames=1,
            extended_offsets=(table, lengths) if table and lengths else None,
        )  # fmt: skip
    except Exception:
        raise BadImage("is a truncated DICOM file") from None
    if syntax == RLE:
        if codestream.unfolds_beyond(frame, dataset.Rows * dataset.Columns):
            raise BadImage("is a broken DICOM file (its runs unfold to more pixels than it has)")
        return
    size = codestream.of_jpeg_2000(frame) if syntax in JPEG_2000 else codestream.of_jpeg(frame)
    if size is None:
        raise BadImage("is a broken DICOM file (its coded image states no size)")
    if size != (dataset.Columns, dataset.Rows):
        raise BadImage(
            f"says {dataset.Columns} x {dataset.Rows} pixels, but its coded image has {size[0]} x {size[1]}"
        )


def stored_values(data: bytes) -> np.ndarray:
    """(H, W) or (H, W, 3) stored values of a file, decoded in this process; colour as RGB."""
    return _decoded(_opened(data))


def _decoded(dataset: Any) -> np.ndarray:
    """(H, W) or (H, W, 3) stored values; colour as RGB."""
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        return _pydicom().pixels.pixel_array(dataset, decoding_plugin=DECODERS.get(syntax, ""))
    except MemoryError:
        raise
    except Exception:
        whole = "broken" if syntax.is_encapsulated else "truncated"
        raise BadImage(f"is a {whole} DICOM file ({syntax.name} pixels cannot be decoded)") from None


def _check_decoder(dataset: Any) -> None:
    """Raises BadImage for a transfer syntax that nobody decodes, MachineError for what nobody does here."""
    pydicom = _pydicom()
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        decoder = pydicom.pixels.get_decoder(syntax)
    except NotImplementedError:
        name = syntax.name if syntax in pydicom.uid.AllTransferSyntaxes else "an unknown transfer syntax"
        raise BadImage(f"has {name}, which no decoder reads") from None
    plugin = DECODERS.get(syntax)
    if syntax == EXTENDED and dataset.BitsStored != 8:
        raise BadImage("is a JPEG of 12 bits, which no free decoder reads; store it uncompressed")
    if not decoder.is_available or (plugin and plugin not in decoder.available_plugins):
        raise MachineError(f"no decoder for {syntax.name} is installed; run pip install 'noisyssl[dicom]'.")
