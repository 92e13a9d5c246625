"""Opening data: good images with labels and splits; bad files and leaks are found before anything trains."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from noisyssl.disk import write_whole
from noisyssl.errors import DataError, MachineError
from noisyssl.pipelines import patients
from noisyssl.pipelines.decoding import Progress, Scan, cache_folder, scan_array, scan_files
from noisyssl.pipelines.findings import (
    Report,
    class_faults,
    identical_images,
    look_alikes,
    lost_classes,
    report_on,
)
from noisyssl.pipelines.samples import Samples
from noisyssl.pipelines.sources import Listing, class_names, read_source
from noisyssl.pipelines.splits import make_splits
from noisyssl.pipelines.tables import table_text


def open_samples(
    path: Path | str,
    *,
    seed: int = 0,
    quarantine: bool = False,
    allow_leaks: bool = False,
    labelled: bool | None = None,
    classify: bool = True,
    evaluation: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Samples:
    """The good images of a source, with splits; decoded once and remembered for the next time.

    Args:
        path: Folder, CSV, `.npz` or packed folder; see `read_source`.
        seed: `data.split_seed`, for the splits that the source does not give.
        quarantine: Leave bad files out instead of raising.
        allow_leaks: Accept images and groups that are in two splits.
        labelled: True demands labels, False drops them, None takes what is there.
        classify: False if no classifier will be trained: labels stay, and what is wrong with the classes is
            no fault.
        evaluation: The set is only measured on: no split is made (all is `test` where the source has
            none), and classes and leaks are not checked.
        threads: Threads that decode; all cores by default.
        progress: Told how far the scan is.

    Raises:
        ConfigError: the path is not there.
        DataError: bad files, leaks, or labels that cannot be trained on.
    """
    samples, report = _survey(
        Path(path), seed, labelled, evaluation, threads, progress, every_block=False, classify=classify
    )
    report.raise_for(quarantine=quarantine, allow_leaks=allow_leaks or evaluation)
    if not report.bad:
        return samples
    path, reason = report.bad[0]
    count = f"{len(report.bad):,} of {len(report.bad) + len(samples):,} files are left out"
    return replace(samples, notes=(*samples.notes, f"{count}, the first: {path} ({reason})."))


def check(
    path: Path | str,
    *,
    out: Path | None = None,
    seed: int = 0,
    labelled: bool | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """What is in a source and what is wrong with it; `Report.raise_for` turns that into an error.

    Writes `samples.csv` and `quarantine.csv` into the cache folder, where that can be written, and into
    `out`. A packed folder is verified whole.

    Raises:
        ConfigError: the path is not there.
        DataError: the source cannot be read at all.
        MachineError: a table cannot be written into `out`.
    """
    path = Path(path)
    samples, report = _survey(path, seed, labelled, False, threads, progress, every_block=True)
    files = np.frombuffer(bytes.fromhex("".join(samples.digests)), np.uint8).reshape(len(samples), 32)
    report.same_bytes = identical_images(samples, files)
    tables = {"samples.csv": table_text(samples.columns())}
    tables["quarantine.csv"] = table_text(dict(zip(("path", "reason"), _transposed(report.bad), strict=True)))
    report.folder = str(out or cache_folder(path))
    if out:
        _write(tables, out)
    try:
        _write(tables, cache_folder(path))
    except MachineError as error:  # as for the scan itself: the findings matter more
        report.folder = str(out or "")
        report.notes += (f"The tables are not kept ({error}); name a folder with --out.",) if not out else ()
    return report


def _write(tables: Mapping[str, str], folder: Path) -> None:
    for name, text in tables.items():
        write_whole(folder / name, text)


def _transposed(pairs: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
    return [first for first, _ in pairs], [second for _, second in pairs]


def _survey(
    source: Path,
    seed: int,
    labelled: bool | None,
    evaluation: bool,
    threads: int | None,
    progress: Progress | None,
    *,
    every_block: bool,
    classify: bool = True,
) -> tuple[Samples, Report]:
    listing = read_source(source, every_block=every_block)
    if labelled and listing.labels is None:
        raise DataError(f"{source} has no labels; use class folders or a CSV with a label column.")
    if listing.doubt and labelled is not False and not evaluation:  # evaluation knows the classes there are
        raise DataError(listing.doubt)
    notes = list(listing.notes)
    scan = scan_of(listing, threads=threads, progress=progress, notes=notes)
    faults: list[str] = []
    samples, pixels = _samples(listing, scan, seed, evaluation, notes, faults)
    if labelled is False:
        samples = samples.unlabelled()
    gone = [] if labelled is False else lost_classes(scan.paths, scan.reasons, listing.labels)
    if labelled is False or not classify:
        faults.clear()  # too few groups for a split: nothing is held out
    elif not evaluation:
        faults, gone = gone + class_faults(samples) + faults, []
    samples = replace(samples, notes=(*samples.notes, *gone))
    return samples, report_on(source, samples, pixels, faults)


def scan_of(listing: Listing, *, threads: int | None, progress: Progress | None, notes: list[str]) -> Scan:
    """What decoding found in each image of a source; `notes` receives what a person should know."""
    if listing.array is not None:
        return scan_array(listing.array, listing.paths, listing.digests)
    return scan_files(
        listing.root, listing.paths, listing.source, threads=threads, progress=progress, notes=notes
    )


def _samples(
    listing: Listing, scan: Scan, seed: int, evaluation: bool, notes: list[str], faults: list[str]
) -> tuple[Samples, np.ndarray]:
    """The samples without the bad files, and their pixel digests."""
    bad = np.fromiter(map(bool, scan.reasons), bool, len(scan.reasons))
    rows, whole = np.flatnonzero(~bad), not bad.any()

    def good(column: list[str]) -> list[str]:
        return column if whole else [column[row] for row in rows.tolist()]

    paths = good(listing.paths)
    names = None if listing.labels is None else good(listing.labels)
    true_names = None if names is None or listing.true_labels is None else good(listing.true_labels)
    classes = () if names is None else class_names(names, true_names)
    notes += look_alikes(classes)
    number = {name: i for i, name in enumerate(classes)} | {"": -1}
    labels, true = (
        None if column is None else np.fromiter(map(number.__getitem__, column), np.int64, len(rows))
        for column in (names, true_names)
    )
    groups = good(listing.groups) if listing.groups else [""] * len(paths)
    groups = patients.named(
        groups, scan.patients[rows], scan.digests[rows], notes,
        overrule=listing.source.is_dir(),  # who is who is certain, what a folder means is not
        evaluation=evaluation,
    )  # fmt: skip
    if "" in groups:
        groups = [group or path for group, path in zip(groups, paths, strict=True)]
    given = None if listing.splits is None else np.array(good(listing.splits), dtype="<U5")
    if given is None and (evaluation or len(classes) < 2 or not len(rows)):
        splits = np.full(len(rows), "test" if evaluation else "train", dtype="<U5")
    elif given is not None and (evaluation or labels is None):
        splits = given
    else:
        assert labels is not None
        try:
            splits = make_splits(groups, labels, given, scan.pixels[rows], seed=seed)
        except DataError as error:
            faults.append(str(error))
            splits = np.full(len(rows), "train", dtype="<U5") if given is None else given
        for part in ("val", "test"):
            if (splits == part).any() and (given is None or not (given == part).any()):
                notes.append(f"{part} was made from {_count(groups, splits == part)} (seed {seed}).")
    hexes = scan.digests[rows].tobytes().hex()
    samples = Samples(
        root=listing.root,
        paths=paths,
        classes=classes,
        labels=np.full(len(rows), -1, np.int64) if labels is None else labels,
        true_labels=true,
        splits=splits,
        groups=groups,
        heights=scan.heights[rows],
        widths=scan.widths[rows],
        native=scan.native[rows],
        digests=[hexes[i : i + 64] for i in range(0, len(hexes), 64)],
        quarantined=tuple((scan.paths[row], scan.reasons[row]) for row in np.flatnonzero(bad).tolist()),
        notes=tuple(notes),
        array=listing.array,
    )
    return samples, scan.pixels[rows]


def _count(groups: list[str], chosen: np.ndarray) -> str:
    rows = np.flatnonzero(chosen).tolist()
    return f"{len({groups[row] for row in rows}):,} training groups, {len(rows):,} images"
