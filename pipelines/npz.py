"""Arrays of images in one `.npz` file, as MedMNIST has them."""

import zipfile
from pathlib import Path

import numpy as np

from noisyssl.errors import DataError
from noisyssl.pipelines.samples import SPLIT_NAMES, SPLITS
from noisyssl.pipelines.sources import Listing
from noisyssl.pipelines.tables import some

KNOWN = "known are train_images, train_labels and those of val and test"


def read_npz(path: Path) -> Listing:
    """A MedMNIST file: {train, val, test}_images (N, H, W[, 3]) uint8 and _labels (N, 1) integers.

    A split may have any name of `SPLIT_NAMES`; other keys are named in a note. The arrays are compressed in
    the file, so all of it is read into memory; `pack` large sets.
    """
    images, labels, splits, used = [], [], [], set()
    try:
        with np.load(path, allow_pickle=False) as file:
            names = _names(path, file.files)
            for split in SPLITS:
                if name := names.get((split, "images")):
                    used.add(name)
                    images.append(_npz_images(path, name, file[name]))
                    splits += [split] * len(images[-1])
                    if name := names.get((split, "labels")):
                        used.add(name)
                        labels += _npz_labels(path, name, file[name], len(images[-1]))
            keys, unread = ", ".join(file.files), some([name for name in file.files if name not in used])
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} is not a readable .npz file ({error}); download or write it again."
        ) from None
    if not splits:
        raise DataError(f"{path} holds {keys or 'nothing'}; it must hold train_images and train_labels.")
    if labels and len(labels) != len(splits):
        raise DataError(
            f"{path} has labels for {len(labels):,} of {len(splits):,} images; label all splits or none."
        )
    if len({part.shape[1:] for part in images}) > 1:
        shapes = ", ".join(str(part.shape) for part in images)
        raise DataError(f"{path} holds images of different shapes ({shapes}); all must be equal.")
    array = np.concatenate(images) if len(images) > 1 else images[0]
    if array.ndim == 3:
        array = np.broadcast_to(array[..., None], (*array.shape, 3))
    numbers = [i for part in images for i in range(len(part))]
    return Listing(
        source=path,
        root=path.parent,
        paths=[f"{split}/{i:06d}" for split, i in zip(splits, numbers, strict=True)],
        labels=labels or None,
        splits=splits,
        array=array,
        notes=(f"Keys not read: {unread} ({KNOWN}).",) if unread else (),
    )


def _names(path: Path, files: list[str]) -> dict[tuple[str, str], str]:
    """(split, "images" or "labels") -> the key of that array."""
    names: dict[tuple[str, str], str] = {}
    for name in files:
        word, _, what = name.lower().rpartition("_")
        if word in SPLIT_NAMES and what in ("images", "labels"):
            other = names.setdefault((SPLIT_NAMES[word], what), name)
            if other != name:
                raise DataError(f"{path} holds {other} and {name}, which are one split; keep one.")
    return names


def _npz_images(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    good = array.dtype == np.uint8 and (array.ndim == 3 or (array.ndim == 4 and array.shape[-1] == 3))
    if not good or 0 in array.shape[1:]:
        raise DataError(
            f"{path}: {name} is {array.dtype} {array.shape}; it must be uint8 (N, H, W) or (N, H, W, 3)."
        )
    return array


def _npz_labels(path: Path, name: str, array: np.ndarray, count: int) -> list[str]:
    flat = array.reshape(-1)
    whole = np.issubdtype(array.dtype, np.integer) and array.ndim <= 2
    if not whole or not len(flat) == len(array) == count:
        raise DataError(f"{path}: {name} is {array.dtype} {array.shape}; it must be integers ({count}, 1).")
    return [str(number) for number in flat.tolist()]
