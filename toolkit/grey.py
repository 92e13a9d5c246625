"""The grey scale of a DICOM image: stored values to what a screen shows (PS3.3 C.11.1, C.11.2, C.11.6)."""

from typing import Any

import numpy as np

from noisyssl.images import BadImage


def shown(stored: np.ndarray, dataset: Any) -> np.ndarray:
    """(H, W) uint8, black 0 and white 255, of (H, W) stored values.

    Raises:
        BadImage: a table, scale or window that cannot be applied.
    """
    values, ends = modality(stored, dataset)
    values = of_interest(values, ends, stored, dataset)
    if "MONOCHROME1" in dataset.PhotometricInterpretation or dataset.get("PresentationLUTShape") == "INVERSE":
        values = 1 - values
    # rounded first, or ties would fall another way in the inverted twin of an image
    return np.floor(np.round(values * 255, 6) + 0.5).astype(np.uint8)


def modality(stored: np.ndarray, dataset: Any) -> tuple[np.ndarray, tuple[float, float]]:
    """Values with a meaning, such as Hounsfield units, and the ends of their range: by table, or a scale."""
    if table := dataset.get("ModalityLUTSequence"):
        entries, bits = looked_up(stored, table[0], dataset)
        return entries, (0, 2**bits - 1)
    low = -(2 ** (dataset.BitsStored - 1)) if dataset.get("PixelRepresentation") else 0
    high = low + 2**dataset.BitsStored - 1
    holder = grouped(dataset, "PixelValueTransformationSequence")
    slope, intercept = holder.get("RescaleSlope"), holder.get("RescaleIntercept")
    if slope is None or intercept is None:
        return stored, (low, high)
    slope, intercept = float(slope), float(intercept)
    if not slope or not np.isfinite([slope, intercept]).all():
        raise BadImage(f"has a rescale slope of {slope:g} and an intercept of {intercept:g}")
    ends = sorted((low * slope + intercept, high * slope + intercept))
    return stored * slope + intercept, (ends[0], ends[1])


def of_interest(
    values: np.ndarray, ends: tuple[float, float], stored: np.ndarray, dataset: Any
) -> np.ndarray:
    """(H, W) float64 of 0 to 1: what the first VOI LUT or window selects, or all where there is none."""
    if table := dataset.get("VOILUTSequence"):
        entries, bits = looked_up(np.rint(values).astype(np.int64), table[0], dataset)
        return np.minimum(entries / (2**bits - 1), 1)
    holder = grouped(dataset, "FrameVOILUTSequence")
    centre, width = first(holder.get("WindowCenter")), first(holder.get("WindowWidth"))
    if centre is not None and width is not None:
        return windowed(values, centre, width, str(holder.get("VOILUTFunction") or "LINEAR").upper())
    if dataset.BitsStored <= 8:
        return np.clip((values.astype(np.float64) - ends[0]) / (ends[1] - ends[0]), 0, 1)
    return stretched(values, ~padding(stored, dataset))


def windowed(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """(H, W) float64 of 0 to 1 (PS3.3 C.11.2.1.2.1 and C.11.2.1.3).

    Raises:
        BadImage: unknown function, or a width that the function does not allow.
    """
    least = 1 if function == "LINEAR" else np.finfo(float).tiny
    known = function in ("LINEAR", "LINEAR_EXACT", "SIGMOID")
    if not known or not width >= least or not np.isfinite([centre, width]).all():
        raise BadImage(f"has a window of width {width:g} that cannot be applied")
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - centre) / width))
    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1
    if width == 0:
        return (values > centre).astype(np.float64)
    return np.clip((values - centre) / width + 0.5, 0, 1)


def stretched(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """(H, W) float64: 0 at the smallest value of the pixels that count, 1 at the largest."""
    if not counted.any():
        counted = np.ones_like(counted)
    low, high = float(values[counted].min()), float(values[counted].max())
    return np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros(values.shape)


def padding(stored: np.ndarray, dataset: Any) -> np.ndarray:
    """(H, W) bool: pixels outside what was imaged."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, bool)
    limit = dataset.get("PixelPaddingRangeLimit")
    ends = sorted(as_stored(int(one), dataset) for one in (value, value if limit is None else limit))
    return (stored >= ends[0]) & (stored <= ends[1])


def as_stored(value: int, dataset: Any) -> int:
    """`value` in the range of stored values: some writers give a signed one by its unsigned bits."""
    bits = dataset.BitsAllocated
    value %= 1 << bits
    return value - (1 << bits) if dataset.get("PixelRepresentation") and value >> (bits - 1) else value


def looked_up(values: np.ndarray, item: Any, dataset: Any) -> tuple[np.ndarray, int]:
    """The entries of a lookup table (Modality or VOI LUT) for integer values, and the bits an entry has.

    Raises:
        BadImage: a table without entries, or with fewer than it says.
    """
    try:
        count, start, bits = (int(number) for number in item.LUTDescriptor)
        data = item.LUTData
        if isinstance(data, bytes):
            order = "<" if dataset.file_meta.TransferSyntaxUID.is_little_endian else ">"
            single = len(data) - (count or 1 << 16) in (0, 1)
            entries = np.frombuffer(data, np.uint8 if single else f"{order}u2")
        else:
            entries = np.atleast_1d(np.asarray(data, np.int64))
    except (AttributeError, TypeError, ValueError):
        raise BadImage("has a lookup table that cannot be read") from None
    if start > 0x7FFF and values.min(initial=0) < 0:
        start -= 1 << 16  # written as unsigned
    count = count or 1 << 16
    if len(entries) < count or not 8 <= bits <= 16:
        raise BadImage(f"has a lookup table of {len(entries)} entries that says {count} of {bits} bits")
    return entries[np.clip(values.astype(np.int64) - start, 0, count - 1)].astype(np.int64), bits


def grouped(dataset: Any, name: str) -> Any:
    """Where an attribute stands: in the functional group `name` of enhanced objects, else in the data set."""
    for place in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        if (groups := dataset.get(place)) and (found := groups[0].get(name)):
            return found[0]
    return dataset


def first(value: Any) -> float | None:
    """The first of one or several numbers."""
    if value is None or value == "":
        return None
    try:
        return float(value if isinstance(value, int | float | str) else value[0])
    except (TypeError, ValueError, IndexError):
        raise BadImage("has a window that is no number") from None
