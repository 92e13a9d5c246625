"""Label noise put in on purpose: which labels flip is a pure function of (seed, sample index).

T[i, j] = P(given = j | true = i). Symmetric noise here is exclusive: a flipped label is never the true class
(Khanal et al., 2023; Co-teaching, arXiv:1804.06872), so the rate is the expected share of wrong labels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from noisyssl.errors import ConfigError, near_miss
from noisyssl.philox import MASK, philox

STREAM = 0x6E6F6973
"""Third word of the counter: keeps these draws apart from all others of the same seed."""


def _symmetric(rate: float, classes: int) -> np.ndarray:
    transition = np.full((classes, classes), rate / (classes - 1))
    np.fill_diagonal(transition, 1 - rate)
    return transition


KINDS: dict[str, Callable[[float, int], np.ndarray]] = {
    "none": lambda rate, classes: np.eye(classes),
    "symmetric": _symmetric,
}


@dataclass(frozen=True, slots=True)
class Noise:
    """A kind of noise and its rate."""

    kind: str = "none"
    rate: float = 0.0
    """Expected share of wrong labels, in [0, 1)."""

    def __str__(self) -> str:
        return "none" if self.kind == "none" else f"{self.kind}:{self.rate:g}"


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
    """The noise that `KIND:RATE` or `none` names.

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
    try:
        rate = float(text)
    except ValueError:
        rate = float("nan")
    if not 0 <= rate < 1:
        raise ConfigError(
            f"train.noise is {spec!r}; the rate must be a number in [0, 1). Write for example {kind}:0.4."
        )
    return Noise(kind, rate)


def matrix(noise: Noise, classes: int) -> np.ndarray:
    """(C, C) float64 T[i, j] = P(given = j | true = i); rows sum to 1.

    Raises:
        ConfigError: fewer than two classes, so no label can be wrong.
    """
    if classes < 2 and noise.rate > 0:
        raise ConfigError(
            f"train.noise is '{noise}' but the data has {classes} class; noise needs two or more."
        )
    return KINDS[noise.kind](noise.rate, classes) if classes > 1 else np.eye(classes)


def is_recoverable(noise: Noise, classes: int) -> bool:
    """Whether the true class stays the most likely given label of every class.

    For symmetric noise that is rate < (C - 1) / C: beyond it no method without clean labels can win.
    """
    transition = matrix(noise, classes)
    wrong = np.where(np.eye(classes, dtype=bool), 0, transition).max(axis=1)
    return bool((transition.diagonal() > wrong + 1e-12).all())  # at the bound itself rounding must not decide


def inject(
    labels: np.ndarray, noise: Noise, classes: int, seed: int, rows: np.ndarray | None = None
) -> np.ndarray:
    """(N,) int64 labels after noise; a new array.

    Row i of `labels` is the sample with index i: its draw depends on (seed, i) only, so other samples change
    nothing. At a higher rate the rows that flipped before still flip, symmetric ones to the same class.

    Args:
        labels: (N,) int64, the whole table; -1 (no label) stays -1.
        noise: kind and rate.
        classes: number of classes C; labels lie in [-1, C).
        seed: any integer; its lower 64 bits count.
        rows: (M,) indices that may change, such as those of the training split; all without it.
    """
    transition = matrix(noise, classes)
    index = np.arange(len(labels)) if rows is None else np.asarray(rows, dtype=np.int64)
    index = index[labels[index] >= 0]
    label = labels[index]
    draws = philox((index & MASK, index >> 32, STREAM, 0), (seed & MASK, seed >> 32 & MASK))
    whether, where = (np.asarray(draw) * 2.0**-32 for draw in draws[:2])
    flipped = whether < 1 - transition.diagonal()[label]
    index, label, where = index[flipped], label[flipped], where[flipped]
    out = np.array(labels, dtype=np.int64)
    others = np.where(np.eye(classes, dtype=bool), 0, transition)
    edges = np.cumsum(others, axis=1)
    chosen = (edges[label] <= where[:, None] * edges[label, -1:]).sum(axis=1)
    out[index] = chosen
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
