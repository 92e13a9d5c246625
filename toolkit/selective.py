"""After training: probabilities that mean what they say, and answers only where they are sure enough.

NumPy only. Everything is fitted on held-out samples that are not the test split; the test split measures it.

- Temperature: Guo et al., ICML 2017, arXiv:1706.04599, section 4.2. One number divides all logits, chosen for
  the smallest negative log-likelihood; no prediction changes.
- Selective prediction: Geifman & El-Yaniv, NIPS 2017, arXiv:1705.08500. Samples are answered in the order of
  their confidence; the risk is the share of wrong answers among the answered ones.

Labels that are partly wrong mislead both: a sure and right answer counts as wrong where its label is. The
temperature then comes out too high and the accuracy too low, so thresholds are too strict, never too lax, as
long as noise does not favour the network's own mistakes.
"""

from dataclasses import dataclass

import numpy as np

from noisyssl.errors import DataError
from noisyssl.evaluation import softmax

COLDEST, HOTTEST = 0.05, 20.0
"""Temperatures that are considered."""
STEPS = 60
"""Halvings by the golden ratio: the interval of log T ends below 1e-11."""


def log_likelihood(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    """Mean log-probability of the (N,) labels under (N, K) logits / temperature."""
    scores = np.asarray(logits, dtype=np.float64) / temperature
    scores = scores - scores.max(axis=1, keepdims=True)
    chosen = scores[np.arange(len(labels)), labels]
    return float((chosen - np.log(np.exp(scores).sum(axis=1))).mean())


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature in [`COLDEST`, `HOTTEST`] with the highest likelihood of the (N,) labels.

    The likelihood has one maximum over 1 / T (it is concave there), so a golden-section search finds it.

    Args:
        logits: (N, K).
        labels: (N,) in [0, K); rows labelled -1 are left out.

    Raises:
        DataError: no labelled row.
    """
    known = labels >= 0
    if not known.any():
        raise DataError("a temperature is asked of 0 labelled samples; give a validation split with labels.")
    logits, labels = np.asarray(logits, dtype=np.float64)[known], labels[known]
    low, high, ratio = np.log(COLDEST), np.log(HOTTEST), (5**0.5 - 1) / 2

    def score(log_temperature: float) -> float:
        return log_likelihood(logits, labels, float(np.exp(log_temperature)))

    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = score(left), score(right)
    for _ in range(STEPS):
        if at_left < at_right:
            low, left, at_left = left, right, at_right
            at_right = score(right := low + ratio * (high - low))
        else:
            high, right, at_right = right, left, at_left
            at_left = score(left := high - ratio * (high - low))
    return float(np.exp((low + high) / 2))


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Accuracy among the most confident samples, for every number of them."""

    threshold: np.ndarray
    """(M,) distinct confidences, falling: samples at or above it are answered."""
    coverage: np.ndarray
    """(M,) share of all samples that are answered."""
    risk: np.ndarray
    """(M,) share of wrong answers among them."""

    def area(self) -> float:
        """Area under risk over coverage (AURC): the mean risk over coverages, 0 at best."""
        widths = np.diff(self.coverage, prepend=0.0)
        return float((self.risk * widths).sum())

    def threshold_for(self, accuracy: float) -> tuple[float, float, float] | None:
        """(threshold, coverage, accuracy) of the largest coverage that is right often enough; or None.

        The threshold lies half-way to the next confidence, so that rounding moves no sample across it.
        """
        enough = np.flatnonzero(1 - self.risk >= accuracy - 1e-12)
        if not len(enough):
            return None
        place = enough[-1]
        below = self.threshold[place + 1] if place + 1 < len(self.threshold) else 0.0
        return (
            float(self.threshold[place] + below) / 2,
            float(self.coverage[place]),
            float(1 - self.risk[place]),
        )


def selection(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> Selection:
    """The coverage-risk curve of (N, K) logits on (N,) labels; rows labelled -1 are left out.

    Raises:
        DataError: no labelled row.
    """
    known = labels >= 0
    if not known.any():
        raise DataError("a coverage-risk curve is asked of 0 labelled samples; give samples with labels.")
    probabilities = softmax(np.asarray(logits, dtype=np.float64)[known] / temperature)
    confidence, wrong = probabilities.max(axis=1), probabilities.argmax(axis=1) != labels[known]
    order = np.argsort(-confidence, kind="stable")
    falling = confidence[order]
    last = np.flatnonzero(np.append(falling[1:] != falling[:-1], True))  # equals are answered together
    answered = last + 1
    return Selection(
        threshold=falling[last],
        coverage=answered / len(falling),
        risk=np.cumsum(wrong[order])[last] / answered,
    )


def warning(rate: float | None, labels: str) -> str | None:
    """What to tell readers of figures fitted on `labels` ("noisy" or "clean"), of which `rate` are wrong."""
    if labels == "clean" or rate == 0:
        return None
    what = "that nobody checked" if rate is None else f"of which {100 * rate:.0f} % are wrong"
    return (
        f"temperature and threshold were fitted on validation labels {what}: where they are wrong, "
        "confidence is understated and the threshold too strict. "
        "Fit them on re-read labels before you rely on them."
    )
