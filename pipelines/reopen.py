"""The samples of a run that exists already: its own rows, whatever became of their files since."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from noisyssl.errors import DataError
from noisyssl.pipelines.decoding import Progress, Scan
from noisyssl.pipelines.patients import START
from noisyssl.pipelines.run import Run
from noisyssl.pipelines.samples import Samples
from noisyssl.pipelines.scan import scan_of
from noisyssl.pipelines.sources import Listing, class_names, read_source
from noisyssl.pipelines.tables import read_own_table

COLUMNS = ("path", "label", "split", "group", "true_label", "width", "height", "digest")


def reopen_samples(
    run: Run,
    source: Path | str,
    *,
    quarantine: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Samples:
    """The samples that `run` was started with, row by row, from `source` as it is now.

    Of a run that keeps no labels (pretraining) they are the source's.

    A file that broke or went away since keeps its row, so that every other sample keeps its index, its
    split and its draws; whoever reads it drops it. The source may have moved: what it holds is compared.

    Args:
        quarantine: accept such files; a note says how many there are.

    Raises:
        ConfigError: the source is not there.
        DataError: it holds other data, or a file broke or went away and `quarantine` is off.
    """
    listing = read_source(source)
    notes = list(listing.notes)
    scan = scan_of(listing, threads=threads, progress=progress, notes=notes)
    rows = read_own_table(run.folder / "samples.csv", COLUMNS)
    place = {path: i for i, path in enumerate(listing.paths)}
    found = np.fromiter((place.get(path, -1) for path in rows["path"]), np.int64, len(rows["path"]))
    labelled = bool(run.facts()["classes"])
    if what := _difference(listing, scan, rows, found, labelled=labelled):
        raise DataError(
            f"{source} is not the data that {run.folder} was started with: {what}; "
            "restore it, or start a new run with another --out."
        )
    lost = _lost(scan, rows["path"], found)
    if lost:
        count = f"{len(lost):,} of the {len(found):,} files of {run.folder} broke or went away since"
        first = f"first: {lost[0][0]}: {lost[0][1]}"
        if not quarantine:
            raise DataError(f"{count}, {first}. Restore them, or go on without them by --quarantine.")
        notes.append(f"{count} and are left out, {first}.")
    columns = [rows[name] for name in ("label", "true_label")]
    if not labelled:
        columns = [_rows_of(column, found) for column in (listing.labels, listing.true_labels)]
    classes = tuple(run.facts()["classes"]) or class_names(*columns)
    number = {name: i for i, name in enumerate(classes)}
    labels, true = (
        np.fromiter((number.get(name, -1) for name in column), np.int64, len(found)) for column in columns
    )
    samples = Samples(
        root=listing.root,
        paths=rows["path"],
        classes=classes,
        labels=labels,
        true_labels=true if classes and listing.true_labels is not None else None,
        splits=np.array(rows["split"], dtype="<U5"),
        groups=rows["group"],
        heights=np.array(rows["height"], dtype=np.int32),
        widths=np.array(rows["width"], dtype=np.int32),
        native=np.where(found >= 0, scan.native[found], False),
        digests=rows["digest"],
        notes=tuple(notes),
        array=listing.array,
    )
    run.must_hold(samples if labelled else samples.unlabelled())
    return samples


def in_splits_of(run: Run, samples: Samples) -> Samples:
    """`samples` as they were opened just now, but in the splits of `run`: what follows it keeps its test set.

    Splits that the source does not give are drawn among all groups: one file lost since moves most of them.
    """
    paths, splits = read_own_table(run.folder / "samples.csv", ("path", "split")).values()
    own = dict(zip(paths, splits, strict=True))
    kept = [own.get(path, now) for path, now in zip(samples.paths, samples.splits.tolist(), strict=True)]
    return replace(samples, splits=np.array(kept, dtype="<U5"))


def _difference(
    listing: Listing, scan: Scan, rows: dict[str, list[str]], found: np.ndarray, *, labelled: bool
) -> str | None:
    """The first thing in which the source as it is now is another data set than `rows`."""
    known = set(rows["path"])
    for path, reason in zip(listing.paths, scan.reasons, strict=True):
        if path not in known and not reason:
            return f"{path} is new"
    if listing.array is not None and listing.paths != rows["path"]:
        return "its images are in another order or not all there"
    parts = set(listing.splits or ())
    for row, i in enumerate(found.tolist()):
        path = rows["path"][row]
        if i < 0:
            if (listing.root / path).exists():
                return f"{path} is not listed any more"
            continue
        if not scan.reasons[i] and scan.digests[i].tobytes().hex() != rows["digest"][row]:
            return f"{path} is another image"
        pairs = [("group", _group(listing, i), rows["group"][row])]
        given = listing.groups and listing.groups[i] and not listing.source.is_dir()
        if rows["group"][row].startswith(START) and scan.patients[i].any() and not given:
            pairs = []  # the patient, read from the file, whose digest is that of then
        if listing.splits is not None:
            split = rows["split"][row]  # one that the source lacks was made, from its training samples
            pairs.append(("split", listing.splits[i], split if split in parts else "train"))
        if labelled:
            labels, true = listing.labels, listing.true_labels
            pairs.append(("label", "" if labels is None else labels[i], rows["label"][row]))
            pairs.append(("true_label", "" if true is None else true[i], rows["true_label"][row]))
        for name, now, then in pairs:
            if now != then:
                return f"{path} has {name} {now!r} instead of {then!r}"
    return None


def _rows_of(column: Sequence[str] | None, found: np.ndarray) -> list[str]:
    """The source's column in the run's order, "" where the file is no longer there."""
    return ["" if column is None or i < 0 else column[i] for i in found.tolist()]


def _group(listing: Listing, i: int) -> str:
    return (listing.groups[i] if listing.groups else "") or listing.paths[i]


def _lost(scan: Scan, paths: list[str], found: np.ndarray) -> list[tuple[str, str]]:
    """(path, reason) of each row whose file is no good any more."""
    reasons = [scan.reasons[i] if i >= 0 else "does not exist" for i in found.tolist()]
    return [(path, reason) for path, reason in zip(paths, reasons, strict=True) if reason]
