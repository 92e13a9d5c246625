"""What becomes of a class when a method trusts none of its labels."""

import numpy as np

RESCUED = 0.1
"""Share of such a class's samples, those with the smallest losses, that are trusted all the same."""


def no_class_emptied(
    trusted: np.ndarray, losses: np.ndarray, labels: np.ndarray, classes: int
) -> tuple[np.ndarray, list[int]]:
    """(N,) bool `trusted` with the best samples of each class that had none, and which classes those were.

    A class that nobody teaches is unlearnt, and then its labels look wrong for good: rare classes, whose
    losses are high because they are rare, go first.

    Args:
        trusted: (N,) bool.
        losses: (N,) of the given labels.
        labels: (N,) int64 given labels in [0, classes).
    """
    trusted, emptied = trusted.copy(), []
    for one in range(classes):
        own = np.flatnonzero(labels == one)
        if len(own) and not trusted[own].any():
            best = own[np.argsort(losses[own], kind="stable")]
            trusted[best[: int(np.ceil(RESCUED * len(own)))]] = True
            emptied.append(one)
    return trusted, emptied
