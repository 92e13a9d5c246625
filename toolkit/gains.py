"""What one training gives over another: paired over seeds and over groups of test samples. NumPy only."""

from collections.abc import Sequence

import numpy as np

from noisyssl.evaluation import Interval


def paired_gain(
    ours: Sequence[np.ndarray],
    theirs: Sequence[np.ndarray],
    labels: np.ndarray,
    groups: Sequence[str] | np.ndarray,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Balanced accuracy of `ours` minus that of `theirs`, mean over seeds, with a 95 % bootstrap interval.

    The percentile bootstrap draws groups (patients, slides) and, where there are several, seeds with
    replacement: the interval is about other patients and another training alike. Both sides of a pair see the
    same draw, so what they share does not widen it. With a single group it is NaN.

    Args:
        ours, theirs: for each seed (N, K) logits, or (E, N, K) of E epochs, whose figures are averaged.
        labels: (N,) in [0, K).
        groups: (N,) names.
    """
    assert len(ours) == len(theirs) > 0, f"{len(ours)} and {len(theirs)} seeds"
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    weights = np.concatenate([np.ones((1, len(names))), drawn])
    gains = np.stack(
        [
            balanced_accuracies(one, labels, group, weights)
            - balanced_accuracies(other, labels, group, weights)
            for one, other in zip(ours, theirs, strict=True)
        ]
    )
    value = float(gains[:, 0].mean())
    if len(names) == 1:
        return Interval(value, float("nan"), float("nan"))
    seeds = generator.integers(len(gains), size=(resamples, len(gains)))
    again = gains[seeds, np.arange(1, resamples + 1)[:, None]].mean(axis=1)
    low, high = np.nanpercentile(again, (2.5, 97.5))
    return Interval(value, float(low), float(high))


def balanced_accuracies(
    logits: np.ndarray, labels: np.ndarray, group: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """(R,) mean sensitivities over the classes present, one for each row of (R, G) weights of the G groups.

    Args:
        logits: (N, K), or (E, N, K): then the mean over the E epochs.
        group: (N,) int64 in [0, G).
    """
    scores = logits if logits.ndim == 3 else logits[None]
    hit = (scores.argmax(axis=2) == labels).mean(axis=0)
    support, hits = np.zeros((2, weights.shape[1], scores.shape[2]))
    np.add.at(support, (group, labels), 1.0)
    np.add.at(hits, (group, labels), hit)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: the class is absent
        return np.nanmean(weights @ hits / (weights @ support), axis=1)
