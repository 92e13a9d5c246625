"""An audit of labels: out-of-sample probabilities by cross-validation on frozen features, and what they say.

Minutes instead of days: no network is trained again, only a logistic regression per fold.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from noisyssl import confident, probe
from noisyssl.baselines import colour_histogram, fit_predict
from noisyssl.errors import DataError
from noisyssl.pipelines.embed import Frozen, features_of
from noisyssl.pipelines.samples import Samples

FOLDS = 5
RESAMPLES = 200


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Of M labelled samples, by row; ranked by whoever shows it."""

    rows: np.ndarray
    """(M,) int64 indices of the samples."""
    labels: np.ndarray
    """(M,) int64 given classes."""
    probabilities: np.ndarray
    """(M, K) out-of-sample."""
    score: np.ndarray
    """(M,) 1 - the probability of the given label."""
    suggested: np.ndarray
    """(M,) int64 the likeliest class."""
    flagged: np.ndarray
    """(M,) bool: confident learning takes the label for wrong."""
    rate: tuple[float, float, float]
    """Estimated share of wrong labels with the ends of its 95 % interval over groups."""
    matrix: np.ndarray
    """(K, K) estimated T[true, given]."""

    def order(self) -> np.ndarray:
        """(M,) places, the most suspicious first; ties by row."""
        return np.lexsort((self.rows, -self.score))


def audit(
    samples: Samples,
    frozen: Frozen,
    device: torch.device,
    threads: int,
    *,
    labels: np.ndarray | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Audit:
    """The audit of every labelled sample of all splits.

    Args:
        samples: labelled.
        frozen: the backbone whose features are looked at; a colour histogram stands beside them.
        labels: (N,) int64 instead of the samples' own, -1 for none.
        seed: of folds and bootstrap.
        progress: told how many images were looked at.

    Raises:
        DataError: fewer than two classes, or a class in too few groups for any fold.
    """
    given = samples.labels if labels is None else labels
    rows = np.flatnonzero(given >= 0)
    must_be_audible(samples, given, rows)
    found = features_of(frozen, samples, rows, device, threads, (colour_histogram,), progress)
    groups = np.array(samples.groups)[rows]
    return judged(np.concatenate(found, 1), given[rows], groups, rows, len(samples.classes), seed)


def judged(
    features: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    rows: np.ndarray,
    classes: int,
    seed: int = 0,
) -> Audit:
    """The audit of M samples by their (M, D) features."""
    p = out_of_sample(features, labels, groups, classes, seed)
    shares = confident.joint(p, labels)
    return Audit(
        rows=rows,
        labels=labels,
        probabilities=p,
        score=confident.suspicion(p, labels),
        suggested=p.argmax(1),
        flagged=confident.flagged(p, labels),
        rate=(confident.noise_rate(shares), *interval(p, labels, groups, seed)),
        matrix=confident.transition(shares),
    )


def out_of_sample(
    features: np.ndarray, labels: np.ndarray, groups: np.ndarray, classes: int, seed: int = 0
) -> np.ndarray:
    """(M, K) probabilities of each sample by a logistic regression that saw none of its group.

    Raises:
        DataError: some fold's training part lacks a class.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    features = features.astype(np.float64)
    strength = penalty(features, labels, groups, classes)
    out = np.empty((len(labels), classes))
    count = min(FOLDS, len(np.unique(groups)), int(np.bincount(labels).max()))
    folds = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    for learn, ask in folds.split(features, labels, groups):
        missing = np.setdiff1d(np.unique(labels), np.unique(labels[learn]))
        if len(missing):
            raise DataError(
                f"class number {missing[0]} lies in too few groups: without one fold nobody teaches it. "
                "Add images of other groups, or leave the group column out."
            )
        out[ask] = np.exp(fit_predict(features[learn], labels[learn], features[ask], classes, strength))
    return out / out.sum(1, keepdims=True)


def penalty(features: np.ndarray, labels: np.ndarray, groups: np.ndarray, classes: int) -> float:
    """The C with the smallest log loss on a fifth of the groups, by given labels: no truth is needed."""
    held = probe.held_out(groups, labels)
    if not held.any() or len(np.unique(labels[~held])) < len(np.unique(labels)):
        return 0.01
    losses = []
    for strength in probe.STRENGTHS:
        scores = fit_predict(features[~held], labels[~held], features[held], classes, strength)
        losses.append(-scores[np.arange(held.sum()), labels[held]].mean())
    return probe.STRENGTHS[int(np.argmin(losses))]


def interval(p: np.ndarray, labels: np.ndarray, groups: np.ndarray, seed: int) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of the estimated rate when groups are drawn anew."""
    _, group = np.unique(groups, return_inverse=True)
    rng = np.random.default_rng(seed)
    rates = []
    for _ in range(RESAMPLES):
        drawn = np.bincount(rng.integers(0, group.max() + 1, group.max() + 1), minlength=group.max() + 1)
        rates.append(confident.noise_rate(confident.joint(p, labels, drawn[group].astype(float))))
    low, high = np.percentile(rates, (2.5, 97.5))
    return float(low), float(high)


def must_be_audible(samples: Samples, labels: np.ndarray, rows: np.ndarray) -> None:
    """Raises DataError for fewer than two classes, or a class of a single group."""
    groups = np.array(samples.groups)[rows]
    found = np.unique(labels[rows])
    if len(found) < 2:
        raise DataError(f"{samples.root} has labels of {len(found)} classes; an audit compares at least two.")
    for one in found:
        count = len(np.unique(groups[labels[rows] == one]))
        if count < 2:
            raise DataError(
                f"class {samples.classes[one]!r} has images of {count} group only; an audit asks a model "
                "that has not seen a group, so a class needs two. Add some, or leave the group column out."
            )


def facts(found: Audit, classes: tuple[str, ...]) -> dict[str, Any]:
    """What `audit.json` holds."""
    rate, low, high = found.rate
    return {
        "images": len(found.rows),
        "flagged": int(found.flagged.sum()),
        "rate": {"value": rate, "low": low, "high": high},
        "classes": list(classes),
        "matrix": found.matrix.tolist(),
    }
