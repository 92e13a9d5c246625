"""Which labels are likely wrong, from out-of-sample probabilities: confident learning.

Northcutt, Jiang & Chuang, JAIR 70, 2021, arXiv:1911.00068. A sample counts as a confident member of class j
if its probability of j reaches the mean probability of j among the samples labelled j; counting given against
confident classes estimates the joint distribution of given and true labels. Ranking by self-confidence
(section 3.2) needs the probability of the given label alone. Same definitions as the authors' cleanlab.
"""

import numpy as np

SLACK = 1e-6
"""How far below its threshold a probability still reaches it: cleanlab's own."""


def suspicion(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(N,) in [0, 1]: 1 - the probability of the given label; the highest is the most suspicious.

    Args:
        probabilities: (N, K) out-of-sample, rows sum to 1.
        labels: (N,) int64 given classes.
    """
    return 1 - probabilities[np.arange(len(labels)), labels]


def thresholds(
    probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """(K,) mean probability of each class among the samples given to it; infinite for a class without any."""
    weights = np.ones(len(labels)) if weights is None else weights
    classes = probabilities.shape[1]
    own = probabilities[np.arange(len(labels)), labels]
    count = np.bincount(labels, weights, classes)
    total = np.bincount(labels, weights * own, classes)
    return np.where(count > 0, total / np.maximum(count, 1e-300), np.inf)


def confident_class(probabilities: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """(N,) int64 the class that each sample is a confident member of; -1 of none."""
    reached = probabilities >= limits - SLACK
    several = reached.sum(1) > 1  # then cleanlab takes the likeliest class even if that one is not reached
    found = np.where(several, probabilities.argmax(1), reached.argmax(1))
    return np.where(reached.any(1), found, -1)


def joint(probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """(K, K) estimated shares Q[given, true] of all samples; sums to 1.

    Confident counts, each given class scaled to the share of samples that it really has (eq. 3).

    Args:
        probabilities: (N, K) out-of-sample.
        labels: (N,) int64 given classes.
        weights: (N,) of the samples, for the bootstrap; 1 without it.
    """
    weights = np.ones(len(labels)) if weights is None else weights
    classes = probabilities.shape[1]
    found = confident_class(probabilities, thresholds(probabilities, labels, weights))
    sure = found >= 0
    counts = np.zeros((classes, classes))
    np.add.at(counts, (labels[sure], found[sure]), weights[sure])
    given = np.bincount(labels, weights, classes)
    diagonal = counts[np.diag_indices(classes)]
    counts[np.diag_indices(classes)] = np.where(given > 0, np.maximum(diagonal, 1), diagonal)
    rows = counts.sum(1, keepdims=True)
    return counts / np.maximum(rows, 1e-300) * given[:, None] / given.sum()


def transition(shares: np.ndarray) -> np.ndarray:
    """(K, K) T[true, given] from the joint shares Q[given, true]; rows sum to 1, an absent class stays."""
    truth = shares.sum(0)
    return np.where(truth[:, None] > 0, shares.T / np.maximum(truth[:, None], 1e-300), np.eye(len(shares)))


def noise_rate(shares: np.ndarray) -> float:
    """The share of wrong labels."""
    return float(1 - np.trace(shares) / shares.sum())


def flagged(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(N,) bool: a confident member of another class than the given one, and less likely the given one."""
    found = confident_class(probabilities, thresholds(probabilities, labels))
    return (found >= 0) & (found != labels) & (probabilities.argmax(1) != labels)
