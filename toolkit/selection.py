"""What becomes of a class when a method trusts too few of its labels."""

import numpy as np

LEAST = 0.1
"""Share of a class's samples, those with the smallest losses, that are trusted whatever a method finds."""


def no_class_starved(
    trusted: np.ndarray, losses: np.ndarray, labels: np.ndarray, classes: int, least: float = LEAST
) -> tuple[np.ndarray, list[int]]:
    """(N,) bool `trusted` with the best samples of each class that had too few, and which classes those were.

    A class that nobody teaches is unlearnt, and then its labels look wrong for good: rare and hard classes,
    whose losses are high because they are rare and hard, go first.

    Args:
        trusted: (N,) bool.
        losses: (N,) of the given labels.
        labels: (N,) int64 given labels in [0, classes).
        least: share of each class that must be trusted.
    """
    trusted, refilled = trusted.copy(), []
    for one in range(classes):
        own = np.flatnonzero(labels == one)
        few = int(np.ceil(least * len(own)))
        if trusted[own].sum() < few:
            trusted[own[np.argsort(losses[own], kind="stable")[:few]]] = True
            refilled.append(one)
    return trusted, refilled
