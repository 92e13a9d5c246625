"""AUROC of every class under many weightings of the groups at once: what the bootstrap asks for."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Ranking:
    """One class's scores reduced to what a weighted Mann-Whitney statistic needs."""

    positives: np.ndarray
    """Group of each positive sample, by score."""
    positive_starts: np.ndarray
    """Where each of the P distinct positive scores begins in `positives`."""
    negatives: np.ndarray
    """Group of each negative sample, by score."""
    below: np.ndarray
    """(P,) negatives with a lower score."""
    upto: np.ndarray
    """(P,) negatives with a lower or the same score."""


def rankings(probabilities: np.ndarray, labels: np.ndarray, group: np.ndarray) -> list[Ranking]:
    """One ranking per class of (N, K) probabilities; `group` is the number of each sample's group."""
    out = []
    for k, score in enumerate(probabilities.T):
        order = np.argsort(score, kind="stable")
        positive = labels[order] == k
        score, ordered = score[order], group[order]
        distinct, starts = np.unique(score[positive], return_index=True)
        negative_scores = score[~positive]
        out.append(
            Ranking(
                positives=ordered[positive],
                positive_starts=starts,
                negatives=ordered[~positive],
                below=np.searchsorted(negative_scores, distinct, side="left"),
                upto=np.searchsorted(negative_scores, distinct, side="right"),
            )
        )
    return out


def aurocs(rankings: list[Ranking], weights: np.ndarray) -> np.ndarray:
    """(K, R): the weighted share of (positive, negative) pairs that are ranked right; a tie counts half.

    float32 holds the multiplicities and their sums, whole numbers below 2**24, exactly.
    """
    small = weights.astype(np.float32)
    out = np.full((len(rankings), weights.shape[1]), np.nan)
    for k, ranking in enumerate(rankings):
        if not len(ranking.positives) or not len(ranking.negatives):
            continue
        positive = np.add.reduceat(small[ranking.positives], ranking.positive_starts, axis=0)
        negative = np.zeros((len(ranking.negatives) + 1, weights.shape[1]), dtype=np.float32)
        np.cumsum(small[ranking.negatives], axis=0, out=negative[1:])
        right = 0.5 * (negative[ranking.below].astype(np.float64) + negative[ranking.upto])
        pairs = positive.sum(axis=0, dtype=np.float64) * negative[-1]
        with np.errstate(invalid="ignore"):
            out[k] = (positive * right).sum(axis=0) / pairs
    return out
