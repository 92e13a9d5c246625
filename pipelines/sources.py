"""What a data source says: which images, and for each its label, split and group. No image is opened here."""

import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from noisyssl.errors import ConfigError, DataError, near_miss
from noisyssl.formats import SUFFIXES
from noisyssl.pipelines.samples import SPLIT_NAMES
from noisyssl.pipelines.tables import header_of, line_of, read_table, some
from noisyssl.pipelines.walk import images_below

KNOWN = ("path", "label", "split", "group", "true_label")
NUMBER = re.compile(r"\d")


@dataclass(frozen=True, kw_only=True)
class Listing:
    """N images as the source names them; each column has N entries or is None where the source is silent."""

    source: Path
    """What the user named."""
    root: Path
    """Folder the paths are relative to."""
    paths: list[str]
    """Relative POSIX paths; `train/000017` in an array file."""
    labels: list[str] | None = None
    """Given label names."""
    splits: list[str] | None = None
    """train, val or test."""
    groups: list[str] | None = None
    """The unit that must not cross splits; "" where an image has none."""
    true_labels: list[str] | None = None
    """True label names; "" where unknown."""
    array: np.ndarray | None = field(default=None, repr=False)
    """(N, H, W, 3) uint8 for array sources; may be memory-mapped or broadcast, so not contiguous."""
    digests: list[str] | None = None
    """Hex SHA-256 of each image's pixels, where the source has them."""
    notes: tuple[str, ...] = ()
    """What was decided without being asked, one sentence each."""
    doubt: str = ""
    """Why the labels can hardly be meant, and what to do; whoever uses labels refuses it."""


def read_source(path: Path | str, *, every_block: bool = False) -> Listing:
    """The images of a folder, CSV, `.npz` or packed folder (verified whole with `every_block`).

    Raises:
        ConfigError: nothing is there, or it is no such source.
        DataError: something inside it is wrong.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(
            f"{path} does not exist; name a folder of images, a CSV, an .npz or a packed folder."
        )
    if path.is_dir():
        if (path / "pack.json").is_file():
            return read_packed(path, every_block)
        return read_folder(path)
    if path.suffix.lower() == ".csv":
        return read_csv(path)
    if path.suffix.lower() == ".npz":
        from noisyssl.pipelines.npz import read_npz

        return read_npz(path)
    raise ConfigError(f"{path} is a {path.suffix or 'plain'} file; name a folder, a .csv or an .npz.")


def read_folder(folder: Path) -> Listing:
    """Class folders, with or without a level of splits above them, or one flat folder without labels.

    The class is the first folder level, searched recursively. A folder below that is a group. Where all
    classes have the same such folders, the classes may be folds and those the classes: that is in doubt.
    """
    ignored: Counter[str] = Counter()
    files = sorted(images_below(str(folder), "", ignored))
    if not files:
        raise DataError(f"{folder} holds no images; supported suffixes are {', '.join(sorted(SUFFIXES))}.")
    parts = [file.split("/") for file in files]
    tops = {names[0] for names in parts if len(names) > 1}
    of_split = {name: SPLIT_NAMES[name.lower()] for name in tops if name.lower() in SPLIT_NAMES}
    splits = None
    if of_split:
        others = sorted(tops - of_split.keys()) + sorted(names[0] for names in parts if len(names) == 1)
        if others:
            raise DataError(
                f"{folder} mixes the split folders {', '.join(sorted(of_split))} with {some(others)}; "
                "its top level must hold splits only or classes only."
            )
        splits = [of_split[names[0]] for names in parts]
        parts = [names[1:] for names in parts]
    loose = sum(len(names) == 1 for names in parts)
    if 0 < loose < len(parts):
        first = next(file for file, names in zip(files, parts, strict=True) if len(names) == 1)
        raise DataError(
            f"{folder} holds {loose:,} images beside class folders, first: {first}; "
            "move each into a class folder."
        )
    notes = []
    if ignored:
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in ignored.most_common(5))
        hint = " Name the CSV itself to use its labels and splits." if ".csv" in ignored else ""
        notes.append(f"{sum(ignored.values()):,} other files were ignored ({kinds}).{hint}")
    listing = Listing(source=folder, root=folder, paths=files, splits=splits, notes=tuple(notes))
    if loose:
        return listing
    groups = [names[1] if len(names) > 2 else "" for names in parts]
    if len(set(groups)) > 1:
        note = f"Sub-folders of the classes were taken as {len(set(groups) - {''}):,} groups."
        listing = replace(listing, groups=groups, notes=(*listing.notes, note))
    return replace(listing, labels=[names[0] for names in parts], doubt=_doubt(folder, parts))


def _doubt(folder: Path, parts: list[list[str]]) -> str:
    """Why the first of `parts` look like folds and the second like classes, or nothing.

    Patients that all have images of every class are met too: there are more of them than classes, and
    their names hold a number.
    """
    below: dict[str, set[str]] = {}
    for names in parts:
        below.setdefault(names[0], set()).add(names[1] if len(names) > 2 else "")
    tops, inner = sorted(below), sorted(below[parts[0][0]])
    if len(tops) < 2 or len(inner) < 2 or "" in inner or any(found != set(inner) for found in below.values()):
        return ""
    if len(inner) > len(tops) and all(map(NUMBER.search, inner)) and not all(map(NUMBER.search, tops)):
        return ""
    return (
        f"{folder}: the folders {some(tops)} look like splits or folds, since all of them hold the same "
        f"folders {some(inner)}, which look like classes; name them train, val and test, or, if they are the "
        "classes, write a CSV with path, label and group."
    )


def read_csv(path: Path) -> Listing:
    """A table with columns path[, label, split, group, true_label]; paths are relative to its folder."""
    columns = read_table(path, KNOWN[:1], KNOWN[1:])
    paths = columns["path"]
    if not paths:
        raise DataError(f"{path} has no rows; list one image per row.")
    columns["path"] = paths = inside(path, paths)
    for name in ("label", "split"):
        empty = columns.get(name, []).count("")
        if empty == len(paths):
            del columns[name]
        elif empty:
            what = f"{name} is empty, as in {empty:,} of {len(paths):,} rows; fill all or none of the column."
            raise _at(path, columns[name].index(""), what)
    if "split" in columns:
        columns["split"] = _splits(path, columns["split"])
    doubt = _no_class(path, columns.get("label"), columns.get("true_label"))
    columns, merged = _merged(path, columns)
    notes = [f"{merged:,} repeated rows of {path.name} were merged."] if merged else []
    if ignored := sorted(set(header_of(path)) - set(KNOWN)):
        free = [name for name in KNOWN if name not in columns]
        meant = next(filter(None, (near_miss(name, free) for name in ignored)), "")
        notes.append(f"Columns not read: {', '.join(ignored)} (known are {', '.join(KNOWN)}).{meant}")
    groups, true = columns.get("group"), columns.get("true_label")
    return Listing(
        source=path,
        root=path.parent,
        paths=columns["path"],
        labels=columns.get("label"),
        splits=columns.get("split"),
        groups=groups if groups and any(groups) else None,
        true_labels=true if true and any(true) else None,
        notes=tuple(notes),
        doubt=doubt,
    )


def inside(table: Path, paths: list[str]) -> list[str]:
    """Normalised relative paths, all inside the table's folder."""
    root = posixpath.abspath(table.parent)
    for row, name in enumerate(paths):
        # Cheap tests first: of a million paths hardly one needs to be taken apart.
        if not name or name[0] == "/" or name[-1] in "./" or "//" in name or "./" in name or "\0" in name:
            if not name or "\0" in name:
                raise _at(table, row, "path is empty; name an image.")
            clean = posixpath.relpath(posixpath.join(root, name), root)
            if clean == "." or clean == ".." or clean.startswith("../"):
                what = f"path {name!r} lies outside {table.parent}, the folder of the table"
                raise _at(table, row, f"{what}; move the table above its images.")
            paths[row] = clean
    return paths


def _no_class(table: Path, labels: list[str] | None, true: list[str] | None) -> str:
    """Which true label is none of the labels, and what to do; or nothing."""
    unknown = set(true or ()) - {*(labels or ()), ""}
    if not labels or not true or not unknown:
        return ""
    row, classes = next(row for row, name in enumerate(true) if name in unknown), class_names(labels)
    what = f"true_label {true[row]!r} is no class of column label; those are {', '.join(classes)}."
    hint = "Correct it, or leave the cell empty where the truth is not known."
    return str(_at(table, row, f"{what}{near_miss(true[row], classes)} {hint}"))


def _splits(table: Path, names: list[str]) -> list[str]:
    known = {name: SPLIT_NAMES.get(name.lower()) for name in set(names)}
    for name, split in sorted(known.items()):
        if split is None:
            raise _at(table, names.index(name), f"split {name!r} is unknown; use train, val or test.")
    return [known[name] or "" for name in names]


def _merged(table: Path, columns: dict[str, list[str]]) -> tuple[dict[str, list[str]], int]:
    """The columns with equal rows merged, and how many rows went."""
    paths = columns["path"]
    first: dict[str, int] = {}
    if len(set(paths)) == len(paths):
        return columns, 0
    for row, name in enumerate(paths):
        earlier = first.setdefault(name, row)
        if earlier == row:
            continue
        for what, column in columns.items():
            if column[row] != column[earlier]:
                both = f"{column[row]!r} but {column[earlier]!r} on line {line_of(table, earlier)}"
                raise _at(table, row, f"path {name!r} has {what} {both}; keep one.")
    rows = list(first.values())
    return {what: [column[row] for row in rows] for what, column in columns.items()}, len(paths) - len(rows)


def _at(table: Path, row: int, what: str) -> DataError:
    return DataError(f"{table}:{line_of(table, row)}: {what}")


def read_packed(folder: Path, every_block: bool = False) -> Listing:
    """A folder that `pack` wrote; its images stay memory-mapped."""
    from noisyssl.pipelines.pack import read_pack

    array, columns = read_pack(folder, every_block=every_block)
    labels, true = columns["label"], columns["true_label"]
    return Listing(
        source=folder,
        root=folder,
        paths=columns["path"],
        labels=labels if any(labels) else None,
        splits=columns["split"],
        groups=columns["group"],
        true_labels=true if any(true) else None,
        array=array,
        digests=columns["digest"],
    )


def class_names(*columns: Sequence[str] | None) -> tuple[str, ...]:
    """The distinct names in label order: by value if all are integers, else by name. "" is no class."""
    names = {name for column in columns if column is not None for name in set(column)} - {""}
    numbers = all(name.removeprefix("-").isdecimal() for name in names)
    return tuple(sorted(names, key=(lambda name: (int(name), name)) if numbers else None))
