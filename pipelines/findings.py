"""What is wrong with a data set as a whole: bad files, identical images, groups in two splits, classes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np

from noisyssl.errors import DataError, near_miss
from noisyssl.pipelines.samples import SPLITS, Samples
from noisyssl.pipelines.splits import identical
from noisyssl.pipelines.tables import some

SHOWN = 20
"""Bad files named in an error."""
NO_TRAINING = (
    "no training images: every image is in val or test. Move some to train, or leave the splits out."
)


@dataclass(frozen=True, kw_only=True)
class Identical:
    """Sets of two or more identical images."""

    sets: tuple[tuple[str, ...], ...] = ()
    """Paths; each set in the order of the samples."""
    across: int = 0
    """Sets that lie in more than one split."""
    contradicting: int = 0
    """Sets with more than one given label."""
    first_across: tuple[str, str] | None = None
    """Two paths of one set in two splits, as "path (split)"."""


@dataclass(kw_only=True)
class Report:
    """What `data check` says of a source."""

    source: str
    images: int
    """Good images."""
    counts: dict[str, dict[str, int]]
    """Images by split, then class; one class "" without labels."""
    bad: tuple[tuple[str, str], ...]
    """(path, reason) of every file that is no image."""
    same_bytes: Identical = Identical()
    """Byte-identical files; only `check` looks for them, since what leaks are pixels."""
    same_pixels: Identical
    """Images with identical pixels, byte-identical files among them."""
    crossing_groups: tuple[tuple[str, tuple[str, ...]], ...]
    """(group, splits) of each group in more than one split."""
    faults: tuple[str, ...]
    """Why no classifier can be trained on it."""
    notes: tuple[str, ...]
    """What opening the data decided by itself."""
    folder: str = ""
    """Where `samples.csv` and `quarantine.csv` are; empty where no folder could be written."""

    @property
    def leak(self) -> bool:
        """Whether training could see a test or validation image."""
        return bool(self.same_pixels.across or self.crossing_groups)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"leak": self.leak}

    def raise_for(self, *, quarantine: bool = False, allow_leaks: bool = False) -> None:
        """Raises DataError for the first of: bad files, faults, a leak; each unless it is accepted."""
        if self.bad and not self.images:
            path, reason = self.bad[0]
            hint = " Repair them, or name other data."
            if "\\" in path:
                hint = " Separate the folders of a path by /, not by backslashes."
            elif "does not exist" in reason:
                hint = " Paths are relative to the folder of the CSV; correct them."
            raise DataError(
                f"{self.source}: all {len(self.bad):,} images are bad, first: {path}: {reason}.{hint}"
            )
        if self.bad and not quarantine:
            shown = "; ".join(f"{path}: {reason}" for path, reason in self.bad[:SHOWN])
            more = f"; and {len(self.bad) - SHOWN:,} more" if len(self.bad) > SHOWN else ""
            raise DataError(
                f"{self.source}: {len(self.bad):,} of {len(self.bad) + self.images:,} files are no good "
                f"images: {shown}{more}. Repair or remove them, or leave them out with --quarantine."
            )
        if self.faults:
            raise DataError(f"{self.source}: {self.faults[0]}")
        if self.leak and not allow_leaks:
            parts = []
            if self.same_pixels.first_across:
                one, two = self.same_pixels.first_across
                parts.append(f"{_sets(self.same_pixels.across)} across splits, first: {one} = {two}")
            if self.crossing_groups:
                group, splits = self.crossing_groups[0]
                count = f"{len(self.crossing_groups):,} group{'s' * (len(self.crossing_groups) > 1)}"
                parts.append(f"{count} in more than one split, first: {group} in {' and '.join(splits)}")
            raise DataError(
                f"{self.source}: training data leaks into the test: {'; '.join(parts)}. "
                "Remove them or assign whole groups to splits, or accept it with --allow-leaks."
            )


def _sets(count: int) -> str:
    return f"{count:,} set{'s' * (count != 1)} of identical images"


def report_on(source: Path, samples: Samples, pixels: np.ndarray, faults: Sequence[str]) -> Report:
    """Everything that is found in the samples of a source and their (N, 32) uint8 pixel digests."""
    names = samples.classes or ("",)
    counts = {}
    for split in SPLITS:
        found = np.bincount(samples.labels[samples.where(split)] % len(names), minlength=len(names))
        if found.any():
            counts[split] = dict(zip(names, found.tolist(), strict=True))
    return Report(
        source=str(source),
        images=len(samples),
        counts=counts,
        bad=samples.quarantined,
        same_pixels=identical_images(samples, pixels),
        crossing_groups=_crossing(samples),
        faults=tuple(faults),
        notes=(*samples.notes, *unmeasured(samples)),
    )


def identical_images(samples: Samples, digests: np.ndarray) -> Identical:
    """The sets of samples whose rows of (N, 32) uint8 digests are equal."""
    sets = identical(digests)
    if not sets:
        return Identical()
    # All sets at once: where each image is there twice, there are half as many sets as images.
    rows, sizes = np.concatenate(sets), np.fromiter(map(len, sets), np.int64, len(sets))
    starts = np.cumsum(sizes) - sizes
    heads = np.repeat(rows[starts], sizes)
    crosses = samples.splits[rows] != samples.splits[heads]
    contradicts = samples.labels[rows] != samples.labels[heads]
    first = None
    for place in np.flatnonzero(crosses)[:1].tolist():
        one, two = (f"{samples.paths[i]} ({samples.splits[i]})" for i in (heads[place], rows[place]))
        first = one, two
    return Identical(
        sets=tuple(tuple(map(samples.paths.__getitem__, part.tolist())) for part in sets),
        across=int(np.logical_or.reduceat(crosses, starts).sum()),
        contradicting=int(np.logical_or.reduceat(contradicts, starts).sum()),
        first_across=first,
    )


def _crossing(samples: Samples) -> tuple[tuple[str, tuple[str, ...]], ...]:
    # Paths are distinct; comparing a million of them takes a tenth of what a set of them takes.
    if samples.groups == samples.paths or len(set(samples.groups)) == len(samples):
        return ()
    number = {group: i for i, group in enumerate(sorted(set(samples.groups)))}
    code = np.fromiter(map(number.__getitem__, samples.groups), np.int64, len(samples))
    present = np.zeros((len(SPLITS), len(number)), bool)
    for row, split in enumerate(SPLITS):
        present[row, code[samples.where(split)]] = True
    names = list(number)
    return tuple(
        (names[group], tuple(split for split, here in zip(SPLITS, present[:, group], strict=True) if here))
        for group in np.flatnonzero(present.sum(axis=0) > 1).tolist()
    )


def class_faults(samples: Samples) -> list[str]:
    """Why a classifier cannot be trained on these samples; nothing for samples without labels."""
    if not samples.classes or not len(samples):
        return []
    found = {split: set(samples.labels[samples.where(split)].tolist()) for split in SPLITS}
    names = [samples.classes[label] for label in sorted(set().union(*found.values()))]
    for name in samples.classes:
        if name.encode(errors="replace").decode() != name:
            return [f"class {name!r} is not valid UTF-8; rename its folder."]
    if len(names) < 2:
        return [
            f"one class only ({names[0]!r}); two are needed. Name the folder of the class folders, or the "
            "CSV that holds the labels; `noisyssl pretrain` needs no labels."
        ]
    if not found["train"]:
        return [NO_TRAINING]
    training = [samples.classes[label] for label in sorted(found["train"])]
    faults = []
    for split in ("val", "test"):
        for label in sorted(found[split] - found["train"]):
            name = samples.classes[label]
            rows = int((samples.labels[samples.where(split)] == label).sum())
            faults.append(
                f"class {name!r} ({rows:,} images) is in {split} but not in train, which has "
                f"{', '.join(training)}.{near_miss(name, training)}"
            )
    return faults


def lost_classes(paths: Sequence[str], reasons: Sequence[str], labels: Sequence[str] | None) -> list[str]:
    """A sentence for each class all files of which are bad; a good file's reason is "".

    Whoever leaves them out would have fewer classes than the data.
    """
    if labels is None or not any(reasons):
        return []
    bad: dict[str, list[int]] = {}
    for row, reason in enumerate(reasons):
        if reason:
            bad.setdefault(labels[row], []).append(row)
    good = {label for label, reason in zip(labels, reasons, strict=True) if not reason}
    return [
        f"class {name!r} has no good image: its files, {len(rows):,} in all, are bad, the first: "
        f"{paths[rows[0]]} ({reasons[rows[0]]}). Restore them, or take the class out of the data."
        for name, rows in sorted(bad.items())
        if name not in good
    ]


def unmeasured(samples: Samples) -> list[str]:
    """A sentence for validation and for test if there are such images, but none of some class."""
    true = samples.labels
    if samples.true_labels is not None:
        true = np.where(samples.true_labels >= 0, samples.true_labels, samples.labels)
    sentences = []
    for split, word in (("val", "validation"), ("test", "test")):
        found = set(true[samples.where(split)].tolist()) - {-1}
        if found and (names := [name for i, name in enumerate(samples.classes) if i not in found]):
            sentences.append(without_images(names, word))
    return sentences


def without_images(names: Sequence[str], split: str) -> str:
    """That the classes called `names` have no images in a split, and what follows."""
    subject, verb, it = ("classes", "have", "them") if len(names) > 1 else ("class", "has", "it")
    there = "" if split == "test" else " there"
    return f"{subject} {some(names)} {verb} no {split} images; nothing measures {it}{there}."


def look_alikes(classes: Sequence[str]) -> list[str]:
    """A note for each set of class names that differ only in case, spaces or Unicode form."""
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(" ".join(normalize("NFKC", name).casefold().split()), []).append(name)
    notes = []
    for names in alike.values():
        if len(names) > 1:
            twins = len({normalize("NFC", name) for name in names}) < len(names)  # they print alike
            shown = " and ".join(map(ascii if twins else repr, names))
            notes.append(
                f"Classes {shown} differ only in case, spaces or Unicode form and are {len(names)} classes; "
                "rename them in the data if they are one."
            )
    return notes
