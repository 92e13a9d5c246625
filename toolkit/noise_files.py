"""Label noise from a CSV file: a whole matrix, or which classes each one is confused with.

A matrix has the given labels in its header and the true one in front of each row; rows sum to 1:

    true,benign,malignant
    benign,0.9,0.1
    malignant,0.3,0.7

Candidates have a line per pair, for class-dependent noise as Khanal et al. 2023 (arXiv:2308.04551) put it in:

    class,candidate
    benign,normal
    benign,malignant
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from noisyssl.errors import ConfigError, near_miss

TOLERANCE = 1e-6
"""Of a row's sum."""


def read_matrix(path: Path, classes: Sequence[str]) -> np.ndarray:
    """(C, C) float64 T[i, j] = P(given j | true i), in the order of `classes` whatever the file's.

    Raises:
        ConfigError: no such file; it lacks a class, has one twice or an unknown one; a cell is no share;
            a row does not sum to 1.
    """
    header, *rows = _rows(path)
    _must_be_all(path, "header", header[1:], classes)
    _must_be_all(path, "first column", [row[0] for row in rows], classes)
    out = np.empty((len(classes), len(classes)))
    for row in rows:
        shares = [_share(path, row[0], text) for text in row[1:]]
        if len(shares) != len(classes) or abs(sum(shares) - 1) > TOLERANCE:
            raise ConfigError(
                f"{path}: the row of {row[0]!r} has {len(shares)} shares that sum to {sum(shares):.6g}; "
                f"it must have {len(classes)} that sum to 1."
            )
        out[classes.index(row[0]), [classes.index(name) for name in header[1:]]] = shares
    return out


def read_candidates(path: Path, classes: Sequence[str]) -> np.ndarray:
    """(C, C) bool: whether the class of a row may be labelled as that of a column; a class itself is none.

    Raises:
        ConfigError: no such file, another header, an unknown class.
    """
    header, *rows = _rows(path)
    if header != ["class", "candidate"]:
        raise ConfigError(
            f"{path}: the header is {','.join(header)!r}; candidates have class,candidate. "
            "If it is a whole matrix, leave the rate out."
        )
    out = np.zeros((len(classes), len(classes)), dtype=bool)
    for row in rows:
        if len(row) != 2:
            raise ConfigError(f"{path}: {','.join(row)!r} is no pair; write class,candidate.")
        one, other = (_place(path, name, classes) for name in row)
        out[one, other] = one != other
    return out


def _rows(path: Path) -> list[list[str]]:
    """The cells of all lines that are not blank, stripped."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file, strict=True) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"train.noise names {path}, which is no readable CSV: {reason}.") from None
    if not rows:
        raise ConfigError(f"train.noise names {path}, which is empty; see docs/noise.md for the two forms.")
    return rows


def _must_be_all(path: Path, where: str, names: Sequence[str], classes: Sequence[str]) -> None:
    for name in names:
        _place(path, name, classes)
    if sorted(names) != sorted(classes):
        missing = [name for name in classes if name not in names]
        what = f"lacks {', '.join(missing)}" if missing else "has a class twice"
        raise ConfigError(f"{path}: the {where} {what}; it must name each of {', '.join(classes)} once.")


def _place(path: Path, name: str, classes: Sequence[str]) -> int:
    if name not in classes:
        raise ConfigError(
            f"{path}: class {name!r} is unknown; the data have {', '.join(classes)}."
            f"{near_miss(name, classes)}"
        )
    return list(classes).index(name)


def _share(path: Path, row: str, text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise ConfigError(f"{path}: the row of {row!r} holds {text!r}; each cell is a share in [0, 1].")
    return share
