"""Label noise put in on purpose: which labels flip is a pure function of (seed, sample index).

T[i, j] = P(given = j | true = i). Symmetric noise here is exclusive: a flipped label is never the true class
(Khanal et al., 2023; Co-teaching, arXiv:1804.06872), so the rate is the expected share of wrong labels.
Inclusive noise draws anew over all classes (DivideMix, arXiv:2002.07394): of a rate r, r (1 - 1/C) is wrong.
Noise that depends on the image is `noisyssl.instance_noise`, matrices from files are `noisyssl.noise_files`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from noisyssl.errors import ConfigError, near_miss
from noisyssl.noise_files import read_candidates, read_matrix
from noisyssl.philox import MASK, philox

STREAM = 0x6E6F6973
"""Third word of the counter: keeps these draws apart from all others of the same seed."""


def _symmetric(rate: float, classes: int) -> np.ndarray:
    transition = np.full((classes, classes), rate / (classes - 1))
    np.fill_diagonal(transition, 1 - rate)
    return transition


def _inclusive(rate: float, classes: int) -> np.ndarray:
    return (1 - rate) * np.eye(classes) + rate / classes


def _pair(rate: float, classes: int) -> np.ndarray:
    return (1 - rate) * np.eye(classes) + rate * np.roll(np.eye(classes), 1, axis=1)


MATRICES: dict[str, Callable[[float, int], np.ndarray]] = {
    "none": lambda rate, classes: np.eye(classes),
    "symmetric": _symmetric,
    "inclusive": _inclusive,
    "pair": _pair,
}
"""Kinds whose matrix the rate decides; `pair` turns each class into the next one, the last into the first."""
KINDS = {
    "none": "none",
    "symmetric": "symmetric:0.4",
    "inclusive": "inclusive:0.4",
    "pair": "pair:0.3",
    "class": "class:MATRIX.csv or class:CANDIDATES.csv:0.3",
    "instance": "instance:0.3 or instance:0.3:RUN",
    "column": "column:NAME",
}
"""How each kind is written."""


@dataclass(frozen=True, slots=True)
class Noise:
    """A kind of noise and its rate."""

    kind: str = "none"
    rate: float | None = 0.0
    """Expected share of wrong labels (inclusive: of labels drawn anew), in [0, 1); None: the data say."""
    source: str = ""
    """class: a CSV file; instance: a pretraining run whose features decide; column: a column of the data."""

    def __str__(self) -> str:
        rate = "" if self.rate is None else f"{self.rate:g}"
        parts = (rate, self.source) if self.kind == "instance" else (self.source, rate)
        return ":".join([self.kind, *(part for part in parts if part)]) if self.kind != "none" else "none"


@dataclass(frozen=True, slots=True)
class Realised:
    """What an injection really did."""

    rate: float
    """Share of the labelled rows whose label changed; NaN without any."""
    matrix: np.ndarray
    """(C, C) shares, row = label before, column = label after; a class without samples has a row of NaN."""
    flips: tuple[tuple[int, int, int], ...]
    """(index, label before, label after) of every changed row, by index."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON; NaN is None."""
        return {
            "rate": None if np.isnan(self.rate) else self.rate,
            "matrix": [[None if np.isnan(share) else share for share in row] for row in self.matrix.tolist()],
            "flips": [{"index": index, "from": before, "to": after} for index, before, after in self.flips],
        }


def parse(spec: str) -> Noise:
    """The noise that a text names; see `KINDS`.

    Raises:
        ConfigError: unknown kind, or the rate is missing, no number or outside [0, 1).
    """
    kind, _, text = spec.partition(":")
    if kind not in KINDS:
        raise ConfigError(
            f"train.noise is {spec!r}; write none or KIND:RATE such as symmetric:0.4, "
            f"the kinds are {', '.join(KINDS)}.{near_miss(kind, KINDS)}"
        )
    if spec == "none":
        return Noise()
    if kind == "none":
        raise ConfigError(f"train.noise is {spec!r}; none takes no rate. Write none.")
    if kind == "column":
        if not text or text.lower() == "path":
            raise ConfigError(
                f"train.noise is {spec!r}; name a column of labels. Write for example column:given."
            )
        return Noise(kind, None, text)
    source = ""
    if kind == "class":
        source, colon, text = text, "", ""
        if (parts := source.rpartition(":"))[1] and _is_number(parts[2]):
            source, colon, text = parts
        if not source:
            raise ConfigError(f"train.noise is {spec!r}; name a file. Write {KINDS[kind]}.")
        if not colon:
            return Noise(kind, None, source)
    elif kind == "instance":
        text, _, source = text.partition(":")
    rate = float(text) if _is_number(text) else float("nan")
    if not 0 <= rate < 1:
        raise ConfigError(
            f"train.noise is {spec!r}; the rate must be a number in [0, 1). Write for example {KINDS[kind]}."
        )
    if kind == "instance" and not (rate == 0 or 0.01 <= rate <= 0.99):
        raise ConfigError(f"train.noise is {spec!r}; the rate of instance noise is 0 or in [0.01, 0.99].")
    return Noise(kind, rate, source)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def matrix(noise: Noise, classes: Sequence[str]) -> np.ndarray:
    """(C, C) float64 T[i, j] = P(given = j | true = i); rows sum to 1.

    Of instance-dependent noise it is the mean over images that its model has before it sees any: symmetric.

    Raises:
        ConfigError: fewer than two classes, so no label can be wrong; a file that does not fit the classes.
        ValueError: the data alone know (column).
    """
    count = len(classes)
    if count < 2 and noise.rate != 0:
        raise ConfigError(
            f"train.noise is '{noise}' but the data has {count} class; noise needs two or more."
        )
    if count < 2:
        return np.eye(count)
    if noise.kind == "class":
        if noise.rate is None:
            return read_matrix(Path(noise.source), classes)
        return _among(read_candidates(Path(noise.source), classes), noise.rate)
    if noise.kind == "column" or noise.rate is None:
        raise ValueError(f"{noise} has no matrix of its own")
    return MATRICES["symmetric" if noise.kind == "instance" else noise.kind](noise.rate, count)


def _among(candidates: np.ndarray, rate: float) -> np.ndarray:
    """The matrix that turns a class into one of its (C, C) bool candidates, each alike; else it stays."""
    chosen = candidates.sum(1, keepdims=True)
    away = rate * candidates / np.maximum(chosen, 1)
    return away + np.diag(1 - away.sum(1))


def is_recoverable(transition: np.ndarray) -> bool:
    """Whether the true class stays the most likely given label of every class.

    For symmetric noise that is rate < (C - 1) / C: beyond it no method without clean labels can win.
    """
    wrong = np.where(np.eye(len(transition), dtype=bool), 0, transition).max(axis=1)
    return bool((transition.diagonal() > wrong + 1e-12).all())  # at the bound itself rounding must not decide


def inject(
    labels: np.ndarray, transition: np.ndarray, seed: int, rows: np.ndarray | None = None
) -> np.ndarray:
    """(N,) int64 labels after noise that depends on the class; a new array.

    Row i of `labels` is the sample with index i: its draw depends on (seed, i) only, so other samples change
    nothing. At a higher rate the rows that flipped before still flip, symmetric ones to the same class.

    Args:
        labels: (N,) int64, the whole table; -1 (no label) stays -1.
        transition: (C, C) of `matrix`.
        seed: any integer; its lower 64 bits count.
        rows: (M,) indices that may change, such as those of the training split; all without it.
    """
    index = np.arange(len(labels)) if rows is None else np.asarray(rows, dtype=np.int64)
    return inject_each(labels, transition[labels[index]], seed, index)


def inject_each(labels: np.ndarray, shares: np.ndarray, seed: int, rows: np.ndarray) -> np.ndarray:
    """`inject` where each of the M `rows` has its own (M, C) `shares` of given labels."""
    index = np.asarray(rows, dtype=np.int64)
    known = labels[index] >= 0
    shares, index = shares[known], index[known]
    label = labels[index]
    draws = philox((index & MASK, index >> 32, STREAM, 0), (seed & MASK, seed >> 32 & MASK))
    whether, where = (np.asarray(draw) * 2.0**-32 for draw in draws[:2])
    own = np.arange(len(label)), label
    flipped = whether < 1 - shares[own]
    others = shares.copy()
    others[own] = 0
    edges = np.cumsum(others[flipped], axis=1)
    chosen = (edges <= where[flipped, None] * edges[:, -1:]).sum(axis=1)
    out = np.array(labels, dtype=np.int64)
    out[index[flipped]] = chosen
    return out


def realised(before: np.ndarray, after: np.ndarray, classes: int, rows: np.ndarray | None = None) -> Realised:
    """What changed between the (N,) labels `before` and `after`, over the labelled ones of `rows`."""
    index = np.arange(len(before)) if rows is None else np.sort(np.asarray(rows, dtype=np.int64))
    index = index[before[index] >= 0]
    old, new = before[index], after[index]
    counts = np.bincount(old * classes + new, minlength=classes**2).reshape(classes, classes)
    support = counts.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        shares = counts / support
    changed = old != new
    flips = zip(index[changed].tolist(), old[changed].tolist(), new[changed].tolist(), strict=True)
    return Realised(float(changed.mean()) if len(index) else float("nan"), shares, tuple(flips))
