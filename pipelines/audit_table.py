"""`audit.csv`: what an audit suggests, what a person decides about it, and labels with those decisions."""

import csv
import io
import os
from pathlib import Path

import numpy as np

from noisyssl.errors import ConfigError, DataError, near_miss
from noisyssl.pipelines.audit import Audit
from noisyssl.pipelines.samples import Samples
from noisyssl.pipelines.tables import read_table, table_text, unquote

DECISIONS = ("keep", "relabel", "drop")
COLUMNS = ("path", "label", "suggested", "score", "decision")


def audit_text(found: Audit, samples: Samples, flagged: str) -> str:
    """The table, the most suspicious first.

    Args:
        flagged: the decision that stands beside flagged images; the others keep their label.
    """
    order, names = found.order(), samples.classes
    return table_text(
        {
            "path": [samples.paths[i] for i in found.rows[order]],
            "label": [names[i] for i in found.labels[order]],
            "suggested": [names[i] for i in found.suggested[order]],
            "score": [f"{score:.6f}" for score in found.score[order]],
            "decision": [flagged if flag else "keep" for flag in found.flagged[order]],
        }
    )


def applied(samples: Samples, table: Path, out: Path) -> tuple[str, dict[str, int]]:
    """The CSV of `samples` with the decisions of an audit, its paths relative to `out`, and how many of each.

    Images that the table does not name keep their label.

    Raises:
        ConfigError: from the folder of `out` the images cannot be named.
        DataError: the table is none, names another image or class or decision, was made of other labels, or
            leaves a class without training images.
    """
    read = read_table(table, COLUMNS)  # it was in a spreadsheet: byte order mark, blank lines
    place = {path: row for row, path in enumerate(samples.paths)}
    labels, keep = samples.labels.copy(), np.ones(len(samples), bool)
    counts = dict.fromkeys(DECISIONS, 0)
    for cells in zip(*read.values(), strict=True):
        path, label, suggested, _, decision = map(unquote, cells)
        if path not in place:
            raise DataError(
                f"{table} decides about {path}, which the data do not have; give the audited data."
            )
        row = place[path]
        if decision not in DECISIONS:
            raise DataError(
                f"{table}: the decision about {path} is {decision!r}; choose one of {', '.join(DECISIONS)}."
                f"{near_miss(decision, DECISIONS)}"
            )
        if (now := samples.classes[labels[row]] if labels[row] >= 0 else "") != label:
            raise DataError(
                f"{table} was made when {path} was labelled {label!r}; it is {now!r} now. Audit again."
            )
        if decision == "relabel":
            if suggested not in samples.classes:
                raise DataError(
                    f"{table}: {path} is to become {suggested!r}; choose one of {', '.join(samples.classes)}."
                    f"{near_miss(suggested, samples.classes)}"
                )
            labels[row] = samples.classes.index(suggested)
        keep[row] = decision != "drop"
        counts[decision] += 1
    counts["keep"] = int(keep.sum()) - counts["relabel"]
    must_keep_classes(samples, labels, keep, table)
    return csv_of(samples, labels, np.flatnonzero(keep), out), counts


def must_keep_classes(samples: Samples, labels: np.ndarray, keep: np.ndarray, table: Path) -> None:
    """Raises DataError if a class that had training images has none any more."""
    train = samples.splits == "train"
    before, after = set(samples.labels[train]), set(labels[train & keep])
    if gone := sorted(before - after - {-1}):
        raise DataError(
            f"{table} leaves class {samples.classes[gone[0]]!r} without training images; keep some of it."
        )


def csv_of(samples: Samples, labels: np.ndarray, rows: np.ndarray, out: Path) -> str:
    """A CSV of these rows that `open_samples` reads from the place `out`."""
    if samples.array is not None:
        raise ConfigError(f"{samples.root} is packed or an .npz; give the folder or CSV that it was made of.")
    root = os.path.relpath(samples.root.absolute(), out.absolute().parent)
    if root.split(os.sep)[0] == os.pardir:
        raise ConfigError(
            f"--out {out} lies beside the images; a table names files below its own folder. "
            f"Put it into {samples.root}."
        )
    names = (*samples.classes, "")  # -1 finds the last
    columns = {
        "path": [os.path.normpath(os.path.join(root, samples.paths[i])) for i in rows],
        "label": [names[labels[i]] for i in rows],
        "split": samples.splits[rows].tolist(),
        "group": [samples.groups[i] for i in rows],
    }
    if samples.true_labels is not None:
        columns["true_label"] = [names[samples.true_labels[i]] for i in rows]
    text = io.StringIO()
    writer = csv.writer(text)  # as it is: a table of a user's own has no apostrophes before = + - @
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue()
