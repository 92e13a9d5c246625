"""Question "dicom": are the pixels of DICOM files right? Against pydicom's own pipeline, and each other.

Three tables: phantoms of every bit depth in every lossless transfer syntax; MONOCHROME1 and MONOCHROME2
twins, in pixels and in the logits of a served model; and real files, where a folder of them is named.
highdicom is asked as well where it is installed.
"""

import io
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from noisyssl.benchmarks import dicom_phantoms as phantoms
from noisyssl.benchmarks.inference import random_bundle
from noisyssl.benchmarks.records import Record, record
from noisyssl.deploy.runtime import open_runtime
from noisyssl.errors import ConfigError, DataError
from noisyssl.formats import is_dicom
from noisyssl.geometry import evaluation_view
from noisyssl.images import BadImage, decode

DEPTHS = tuple((bits, signed) for bits in (8, 10, 12, 14, 16) for signed in (False, True))
SIZE = 64


def measure(folder: Path | None = None) -> Iterator[Record]:
    """One record of the syntaxes, one of twins, one of the files of `folder`.

    Raises:
        ConfigError: no such folder.
        DataError: it holds no DICOM file.
    """
    files = _files(folder) if folder is not None else []
    yield syntaxes()
    yield twins()
    if files:
        yield real(files)


def syntaxes() -> Record:
    """The largest difference, in grey levels, that a transfer syntax makes: 0 is asked."""
    figures: dict[str, dict[str, float]] = {}
    for name, uid in phantoms.LOSSLESS.items():
        worst = seconds = 0.0
        for bits, signed in DEPTHS:
            stored = phantoms.picture(bits, signed=signed, size=256)
            centre, width = float(stored.mean()), float(2 * stored.std())
            d = phantoms.dataset(stored, bits, signed=signed, WindowCenter=centre, WindowWidth=width)
            expected, data = decode(phantoms.file(d)), phantoms.file(d, uid)
            decode(data)  # what starts once has started
            start = time.perf_counter()
            seen = decode(data)
            seconds += time.perf_counter() - start
            worst = max(worst, _apart(seen, expected))
        pixels = len(DEPTHS) * expected.shape[0] * expected.shape[1]
        figures[name] = {"phantoms": len(DEPTHS), "largest difference": worst, "MP/s": pixels / seconds / 1e6}
    return record("dicom", settings={"part": "lossless syntaxes"}, figures=figures, n=len(DEPTHS))


def twins() -> Record:
    """Differences between an image and its inverted twin: in grey levels and in logits of ONNX Runtime."""
    pairs = []
    for seed, (bits, _) in enumerate(DEPTHS):
        stored, top = phantoms.picture(bits, seed=seed, size=96), 2**bits - 1
        centre, width = round(0.4 * top), round(0.6 * top)
        seen = phantoms.dataset(stored, bits, WindowCenter=centre, WindowWidth=width)
        twin = phantoms.dataset(
            top - stored, bits, kind="MONOCHROME1", WindowCenter=top + 1 - centre, WindowWidth=width
        )
        pairs.append((decode(phantoms.file(seen)), decode(phantoms.file(twin))))
    with tempfile.TemporaryDirectory() as folder:
        random_bundle(Path(folder) / "bundle", "resnet18-w16", SIZE)
        with open_runtime(Path(folder) / "bundle", "onnx", threads=1) as runtime:
            logits = [
                runtime.logits(np.stack([evaluation_view(image, SIZE) for image in side]))
                for side in zip(*pairs, strict=True)
            ]
    figures = {
        "pixels": {"largest difference": max(_apart(*pair) for pair in pairs)},
        "logits": {"largest difference": float(np.abs(logits[0] - logits[1]).max())},
    }
    return record("dicom", settings={"part": "inverted twins"}, figures=figures, n=len(pairs))


def real(files: list[Path]) -> Record:
    """Each file's largest difference to what others compute, before they round to whole grey levels."""
    figures: dict[str, dict[str, Any]] = {}
    for path in files:
        data = path.read_bytes()
        start = time.perf_counter()
        try:
            seen = decode(data)
        except BadImage as error:
            figures[path.name] = {"refused": str(error)}
            continue
        seconds = time.perf_counter() - start
        row = {"pixels": f"{seen.shape[1]} x {seen.shape[0]}", "ms": 1000 * seconds}
        for name, peer in (("to pydicom", by_pydicom), ("to highdicom", by_highdicom)):
            theirs = peer(data)
            row[name] = None if theirs is None else _apart(seen, theirs)
        figures[path.name] = row
    return record("dicom", settings={"part": "real files"}, figures=figures, n=len(files))


def by_pydicom(data: bytes) -> np.ndarray:
    """(H, W) or (H, W, 3) float64 of 0-255 as pydicom's own functions give it, in the order it documents."""
    from pydicom import dcmread
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut

    d = dcmread(io.BytesIO(data))
    stored = d.pixel_array
    if d.PhotometricInterpretation == "PALETTE COLOR":
        colours = apply_color_lut(stored, d)
        return colours.astype(np.float64) / (256 if colours.dtype == np.uint16 else 1)
    if stored.ndim == 3:
        return stored.astype(np.float64)
    values = apply_modality_lut(stored, d)
    seen = apply_voi_lut(values, d).astype(np.float64)
    low, high = _range(d, stored, values)
    seen = (seen - low) / (high - low)
    return 255 * (1 - seen if d.PhotometricInterpretation == "MONOCHROME1" else seen)


def _range(d: Any, stored: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """What pydicom's output lies between: of a table its bits, of a window the stored bits, rescaled."""
    if d.get("VOILUTSequence"):
        return 0, 2 ** d.VOILUTSequence[0].LUTDescriptor[2] - 1
    half = 2 ** (d.BitsStored - 1)
    low, high = (-half, half - 1) if d.PixelRepresentation else (0, 2 * half - 1)
    slope, shift = float(d.get("RescaleSlope", 1)), float(d.get("RescaleIntercept", 0))
    if d.get("WindowCenter") is None and d.BitsStored > 8:  # no window: the policy of noisyssl.dicom
        return float(values.min()), float(values.max())
    return low * slope + shift, high * slope + shift


def by_highdicom(data: bytes) -> np.ndarray | None:
    """The same of highdicom; None where it is not installed or refuses the file."""
    try:
        import highdicom
        from pydicom import dcmread
    except ImportError:
        return None
    header = dcmread(io.BytesIO(data), stop_before_pixels=True)
    grey = header.PhotometricInterpretation.startswith("MONO")
    if grey and header.get("WindowCenter") is None and not header.get("VOILUTSequence"):
        return None  # it shows the stored values then
    try:
        image = highdicom.imread(io.BytesIO(data))
        frame: np.ndarray = image.get_frame(1, apply_voi_transform=None, voi_output_range=(0, 255))
    except Exception:  # it checks more of a file than its pixels
        return None
    return frame / 256 if frame.max() > 255 else frame


def _apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    if theirs.ndim < ours.ndim:
        theirs = theirs[..., None]
    return float(np.abs(ours.astype(np.float64) - theirs).max())


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; name one with DICOM files.")
    found = sorted(path for path in folder.iterdir() if path.is_file() and is_dicom(path.read_bytes()[:132]))
    if not found:
        raise DataError(f"{folder} holds no DICOM files; name a folder that does.")
    return found
