"""The samples of one data set: a table with a stable row per image, and how to get its pixels."""

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from noisyssl.images import BadImage, decode

SPLITS = ("train", "val", "test")
SPLIT_NAMES = (
    dict.fromkeys(("train", "training"), "train")
    | dict.fromkeys(("val", "valid", "validation", "dev", "development"), "val")
    | dict.fromkeys(("test", "testing"), "test")
)
"""What folders, cells of a CSV and arrays of an `.npz` call the splits, in lower case; any case is taken."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """N images; row i of every column is the sample with index i. Only good images have a row."""

    root: Path
    """Folder the paths are relative to (the CSV's folder, the class folders' parent, the packed folder)."""
    paths: list[str]
    """Relative POSIX paths; for arrays (packed, npz) the original path or `train/000017`."""
    classes: tuple[str, ...]
    """Class names in label order; empty without labels."""
    labels: np.ndarray
    """(N,) int64 given labels; -1 where there is none."""
    true_labels: np.ndarray | None = None
    """(N,) int64, -1 unknown; None when the source has no such column. Only evaluates."""
    splits: np.ndarray
    """(N,) str: train, val or test."""
    groups: list[str]
    """Unit that must not cross splits (patient, slide); the sample's own path where the source names none."""
    heights: np.ndarray
    """(N,) int32 pixels, after EXIF orientation."""
    widths: np.ndarray
    """(N,) int32 pixels, after EXIF orientation."""
    native: np.ndarray
    """(N,) bool: DALI decodes this file to the pixels that `images.decode` gives."""
    digests: list[str]
    """SHA-256 of each file's bytes (of the pixels for arrays)."""
    quarantined: tuple[tuple[str, str], ...] = ()
    """(path, reason) of the files that were left out and have no row."""
    notes: tuple[str, ...] = ()
    """What opening the data decided by itself, one sentence each: for a person to read."""
    array: np.ndarray | None = field(default=None, repr=False)
    """(N, H, W, 3) uint8, memory-mapped, for packed sources; None where each sample is a file."""

    def __len__(self) -> int:
        return len(self.paths)

    def where(self, *splits: str) -> np.ndarray:
        """(M,) int64 indices of the samples in these splits, ascending."""
        return np.flatnonzero(np.isin(self.splits, splits))

    def unlabelled(self) -> "Samples":
        """The same samples without labels and classes."""
        return replace(self, classes=(), labels=np.full(len(self), -1, np.int64), true_labels=None)

    def columns(self) -> dict[str, list[str] | list[int]]:
        """The columns of `samples.csv`, labels by name, "" where there is none."""
        names = (*self.classes, "")  # -1 finds the last
        true = self.true_labels if self.true_labels is not None else np.full(len(self), -1)
        return {
            "path": self.paths,
            "label": [names[label] for label in self.labels.tolist()],
            "split": self.splits.tolist(),
            "group": self.groups,
            "true_label": [names[label] for label in true.tolist()],
            "width": self.widths.tolist(),
            "height": self.heights.tolist(),
            "digest": self.digests,
        }

    def file(self, index: int) -> Path:
        """The file of one sample."""
        return self.root / self.paths[index]

    def encoded(self, index: int) -> bytes:
        """The bytes of one file.

        Raises:
            BadImage: it cannot be read any more.
        """
        try:
            return self.file(index).read_bytes()
        except OSError as error:
            raise BadImage(f"{self.file(index)}: {error.strerror or error}") from None

    def image(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB of one sample, by the one decoder of scan, pack and predict.

        Raises:
            BadImage: the file is broken; the message starts with its path.
        """
        if self.array is not None:
            return np.ascontiguousarray(self.array[index])
        return decode(self.file(index))

    def digest(self) -> str:
        """SHA-256 over paths, labels, splits, groups and file digests: what makes this data this data."""
        true = self.true_labels if self.true_labels is not None else self.labels
        digest = hashlib.sha256(f"{len(self)} ".encode())
        # Whole columns at a time: a million rows take a second. "\0" occurs in no path and no CSV cell.
        for names in (self.classes, self.paths, self.splits.tolist(), self.groups, self.digests):
            digest.update("\0".join([*names, ""]).encode(errors="surrogateescape"))
        for numbers in (self.labels, true):
            digest.update(np.ascontiguousarray(numbers, dtype="<i8").tobytes())
        return digest.hexdigest()
