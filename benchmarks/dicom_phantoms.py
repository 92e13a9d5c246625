"""DICOM files of every kind that `noisyssl.dicom` reads, made from one picture, for tests and benchmarks."""

import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

PLAIN = {
    "implicit": ImplicitVRLittleEndian,
    "explicit": ExplicitVRLittleEndian,
    "deflated": DeflatedExplicitVRLittleEndian,
    "big endian": ExplicitVRBigEndian,
}
LOSSLESS = PLAIN | {
    "RLE": RLELossless,
    "JPEG-LS": JPEGLSLossless,
    "JPEG 2000": JPEG2000Lossless,
    "JPEG lossless": JPEGLosslessSV1,
}
"""Transfer syntaxes that keep every bit."""
LIKE = "1.2.840.10008.5.1.4.1.1.7"  # secondary capture


def picture(bits: int, *, signed: bool = False, size: int = 48, seed: int = 0) -> np.ndarray:
    """(size, size + 8) stored values that use the whole range of `bits`: waves, edges and both ends."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, : size + 8] / size
    waves = np.sin(9 * x + 4 * y * y) * np.cos(5 * y) + 0.2 * rng.standard_normal(y.shape)
    waves[size // 3 :, : size // 3] -= 1.5
    scaled = (waves - waves.min()) / (waves.max() - waves.min())
    values = np.rint(scaled * (2**bits - 1)).astype(np.int64) - (2 ** (bits - 1) if signed else 0)
    return values.astype(np.int16 if signed else np.uint16)


def dataset(
    stored: np.ndarray, bits: int, *, kind: str = "MONOCHROME2", signed: bool = False, **tags: Any
) -> Dataset:
    """An uncompressed image of (H, W) or (H, W, 3) stored values; `tags` are added by keyword."""
    d = Dataset()
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d.file_meta.MediaStorageSOPClassUID = d.SOPClassUID = UID(LIKE)
    d.file_meta.MediaStorageSOPInstanceUID = d.SOPInstanceUID = generate_uid(entropy_srcs=[repr(tags), kind])
    d.Rows, d.Columns = stored.shape[:2]
    d.SamplesPerPixel = stored.shape[2] if stored.ndim == 3 else 1
    if d.SamplesPerPixel == 3:
        d.PlanarConfiguration = 0
    d.BitsAllocated = 8 if bits <= 8 else 16
    d.BitsStored, d.HighBit, d.PixelRepresentation = bits, bits - 1, int(signed)
    d.PhotometricInterpretation = kind
    for keyword, value in tags.items():
        setattr(d, keyword, value)
    width = {(8, False): "u1", (8, True): "i1", (16, False): "<u2", (16, True): "<i2"}
    pixels = stored.astype(width[d.BitsAllocated, signed]).tobytes()
    d.add_new("PixelData", "OB" if d.BitsAllocated == 8 else "OW", pixels + b"\0" * (len(pixels) % 2))
    return d


def table(entries: np.ndarray, first: int, bits: int, says: int | None = None) -> Dataset:
    """An item of a Modality or VOI LUT sequence, its entries as words, that says to have `says` of them."""
    item = Dataset()
    item.add_new("LUTDescriptor", "US" if first >= 0 else "SS", [(says or len(entries)) % 65536, first, bits])
    item.ModalityLUTType = "US"
    item.add_new("LUTData", "OW", entries.astype("<u2").tobytes())
    return item


def palette(d: Dataset, colours: np.ndarray) -> Dataset:
    """`d` with a palette of (N, 3) 16-bit colours."""
    for name, column in zip(("Red", "Green", "Blue"), colours.T, strict=True):
        setattr(d, f"{name}PaletteColorLookupTableDescriptor", [len(colours), 0, 16])
        setattr(d, f"{name}PaletteColorLookupTableData", column.astype("<u2").tobytes())
    return d


def file(d: Dataset, syntax: str = ExplicitVRLittleEndian) -> bytes:
    """The bytes of `d` as a file in a transfer syntax; `d` itself stays as it is."""
    d = pydicom.dcmread(io.BytesIO(plain(d, ExplicitVRLittleEndian)))
    if syntax in PLAIN.values():
        return plain(d, syntax)
    if syntax == JPEGLosslessSV1:
        return _by_gdcm(plain(d, ExplicitVRLittleEndian))
    if syntax == JPEGBaseline8Bit:
        shape = (d.Rows, d.Columns, 3)[: 2 if d.SamplesPerPixel == 1 else 3]
        coded = io.BytesIO()
        Image.fromarray(np.frombuffer(d.PixelData, np.uint8)[: int(np.prod(shape))].reshape(shape)).save(
            coded, "JPEG", quality=95, subsampling=0
        )
        return wrapped(d, coded.getvalue(), syntax)
    d.compress(UID(syntax), generate_instance_uid=False)
    return written(d)


def wrapped(d: Dataset, frame: bytes, syntax: str) -> bytes:
    """`d` with a frame that was encoded elsewhere."""
    d.PixelData = encapsulate([frame])
    d["PixelData"].VR = "OB"
    d["PixelData"].is_undefined_length = True
    d.file_meta.TransferSyntaxUID = UID(syntax)
    if d.SamplesPerPixel == 3:
        d.PhotometricInterpretation = "YBR_FULL_422"
    return written(d)


def plain(d: Dataset, syntax: str) -> bytes:
    if syntax == ExplicitVRBigEndian and d.BitsAllocated == 16:
        d.PixelData = np.frombuffer(d.PixelData, "<u2").astype(">u2").tobytes()
    implicit, little = syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian
    d.file_meta.TransferSyntaxUID = UID(syntax)
    return written(d, implicit_vr=implicit, little_endian=little)


def written(d: Dataset, **how: bool) -> bytes:
    out = io.BytesIO()
    pydicom.dcmwrite(out, d, enforce_file_format=True, **how)
    return out.getvalue()


def _by_gdcm(data: bytes) -> bytes:
    """In JPEG's lossless process, which pydicom does not encode."""
    import gdcm

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "in.dcm")
        path.write_bytes(data)
        reader = gdcm.ImageReader()
        reader.SetFileName(str(path))
        if not reader.Read():
            raise ValueError("GDCM cannot read its input")
        change = gdcm.ImageChangeTransferSyntax()
        change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
        change.SetInput(reader.GetImage())
        if not change.Change():
            raise ValueError("GDCM cannot encode this image")
        writer = gdcm.ImageWriter()
        writer.SetFileName(str(path))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        if not writer.Write():
            raise ValueError("GDCM cannot write its output")
        return path.read_bytes()
