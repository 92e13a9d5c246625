"""The figures of a classifier on labelled samples, each with a bootstrap interval over groups.

NumPy only: training, `evaluate` and serving measure with the same code. Every figure is computed from
weights, one per group, so a resample is a vector of multiplicities and all resamples are computed together.

- Interval: percentile bootstrap, 95 %. Groups (patients, slides) are drawn with replacement; a sample weighs
  as much as its group was drawn. With a single group there is nothing to resample and the interval is NaN.
- A class without samples (in the data or in one resample) has no sensitivity; the macro figures are means
  over the classes that are present. AUROC and specificity need a sample of another class as well.
- Several epochs (LAST): each figure is the mean over them, and a resample gives all of them the same weights.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from noisyssl.auroc import aurocs, rankings
from noisyssl.errors import DataError, TrainingError

BINS = 15
"""Equal-width bins of confidence, (i / 15, (i + 1) / 15], as in Guo et al., arXiv:1706.04599."""
SCALARS = ("accuracy", "balanced_accuracy", "macro_f1", "macro_auroc", "calibration_error")
CHUNK = 4_000_000
"""Weights of samples held at once (32 MB); bounds the memory of the bootstrap."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and its 95 % interval; NaN where undefined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Bin:
    """One bin of the reliability diagram; NaN without samples."""

    confidence: float
    """Mean probability of the predicted class."""
    accuracy: float
    """Share of right predictions."""
    count: float
    """Samples, a mean over the epochs where there are several."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Everything a report says about one classifier on one set of samples."""

    accuracy: Interval
    balanced_accuracy: Interval
    """Mean sensitivity of the classes present."""
    macro_f1: Interval
    macro_auroc: Interval
    """Mean over classes of the area under the ROC curve of its probability, one versus rest."""
    calibration_error: Interval
    """Expected calibration error of the predicted class, 15 equal-width bins."""
    sensitivity: dict[str, Interval]
    specificity: dict[str, Interval]
    n: int
    groups: int
    confusion: tuple[tuple[float, ...], ...]
    """(K, K) counts, row = label, column = prediction; a mean over the epochs where there are several."""
    reliability: tuple[Bin, ...]
    """The 15 bins in order of confidence."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON; NaN is None."""
        return _plain(asdict(self))


def figures(
    logits: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str] | Sequence[int] | np.ndarray,
    classes: Sequence[str],
    resamples: int = 1000,
    seed: int = 0,
) -> Figures:
    """The figures of (N, K) logits, or of (E, N, K) logits of E epochs of the same samples.

    Args:
        logits: any float dtype; computed in float64.
        labels: (N,) int64 in [0, K).
        groups: (N,) names or numbers of the groups that are resampled.
        classes: K names in label order.
        resamples: bootstrap draws.
        seed: seed of the bootstrap; equal seeds draw equal groups.

    Raises:
        DataError: no samples, or a label that is no class.
        TrainingError: a logit is not finite.
    """
    labels = np.asarray(labels, dtype=np.int64)
    probabilities = _probabilities(logits, labels, len(classes))
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    assert len(group) == len(labels), f"{len(group)} groups, {len(labels)} labels"
    table = _resampled(probabilities, labels, group, resamples, seed)
    intervals = [_interval(row, resampled=len(names) > 1) for row in table]
    rest = intervals[len(SCALARS) :]
    return Figures(
        **dict(zip(SCALARS, intervals[: len(SCALARS)], strict=True)),
        sensitivity=dict(zip(classes, rest[: len(classes)], strict=True)),
        specificity=dict(zip(classes, rest[len(classes) :], strict=True)),
        n=len(labels),
        groups=len(names),
        confusion=_confusion(probabilities, labels),
        reliability=_reliability(probabilities, labels),
    )


def gain(
    logits: np.ndarray,
    others: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str] | Sequence[int] | np.ndarray,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Balanced accuracy of `logits` minus that of `others` on the same samples, both (N, K) or (E, N, K).

    Paired: each resample of the groups measures both, so what they share does not widen the interval.

    Raises:
        DataError, TrainingError: as `figures`.
    """
    labels = np.asarray(labels, dtype=np.int64)
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    row = SCALARS.index("balanced_accuracy")
    first, second = (
        _resampled(_probabilities(one, labels, one.shape[-1]), labels, group, resamples, seed)[row]
        for one in (logits, others)
    )
    return _interval(first - second, resampled=len(names) > 1)


def _probabilities(logits: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """(E, N, K) float64 of (N, K) or (E, N, K) logits, checked."""
    scores = np.asarray(logits, dtype=np.float64)
    scores = scores if scores.ndim == 3 else scores[None]
    assert scores.shape[1:] == (len(labels), classes), f"{scores.shape} logits, {len(labels)} labels"
    _check(scores, labels, classes)
    return softmax(scores)


def _resampled(
    probabilities: np.ndarray, labels: np.ndarray, group: np.ndarray, resamples: int, seed: int
) -> np.ndarray:
    """(5 + 2 K, 1 + R) figures, means over the E epochs: of the data itself, then of each resample."""
    groups, classes = int(group.max()) + 1, probabilities.shape[2]
    additive = [_additive(epoch, labels, group, groups) for epoch in probabilities]
    ranked = [rankings(epoch, labels, group) for epoch in probabilities]
    parts = []
    for weights in _weights(groups, resamples, seed, max(1, CHUNK // len(labels))):
        per_epoch = [
            _table(counts.T @ weights, aurocs(ranking, weights), classes)
            for counts, ranking in zip(additive, ranked, strict=True)
        ]
        parts.append(np.mean(per_epoch, axis=0))
    return np.concatenate(parts, axis=1)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis, float64; large logits do not overflow."""
    scores = np.asarray(logits, dtype=np.float64)
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def _check(scores: np.ndarray, labels: np.ndarray, classes: int) -> None:
    if not len(labels):
        raise DataError("figures are asked of 0 samples; give a split or data set that has labelled samples.")
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise DataError(
            f"{len(wrong)} of {len(labels)} labels are unknown, first: {labels[wrong[0]]} in row {wrong[0]}; "
            f"they must lie in 0-{classes - 1}. Leave samples without a label out."
        )
    if not np.isfinite(scores).all():
        count = int((~np.isfinite(scores)).any(axis=(0, 2)).sum())
        raise TrainingError(
            f"logits of {count} of {len(labels)} samples are not finite; figures need finite ones. "
            "Lower train.lr or use precision bf16 or float32."
        )


def _weights(groups: int, resamples: int, seed: int, chunk: int) -> Iterator[np.ndarray]:
    """(groups, R') multiplicities, chunk by chunk; the first column is the data itself."""
    yield np.ones((groups, 1))
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = generator.integers(groups, size=(size, groups)) * size + np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=groups * size).reshape(groups, size).astype(np.float64)


def _bins(confidence: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], confidence)


def _additive(probabilities: np.ndarray, labels: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """(groups, 3 K + 15) sums: support, predictions and hits per class, (hit - confidence) per bin."""
    classes = probabilities.shape[1]
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    hit = (predicted == labels).astype(np.float64)
    out = np.zeros((groups, 3 * classes + BINS))
    np.add.at(out, (group, labels), 1)
    np.add.at(out, (group, classes + predicted), 1)
    np.add.at(out, (group, 2 * classes + labels), hit)
    np.add.at(out, (group, 3 * classes + _bins(confidence)), hit - confidence)
    return out


def _table(sums: np.ndarray, areas: np.ndarray, classes: int) -> np.ndarray:
    """(5 + 2 K, R) figures from the (3 K + 15, R) weighted sums and the (K, R) AUROCs."""
    support, predicted, hits = sums[:classes], sums[classes : 2 * classes], sums[2 * classes : 3 * classes]
    total = support.sum(axis=0)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: the class is absent
        sensitivity = hits / support
        specificity = (total - support - predicted + hits) / (total - support)
        f1 = np.where(support > 0, 2 * hits / (support + predicted), np.nan)
    scalars = (
        hits.sum(axis=0) / total,
        _mean_of_defined(sensitivity),
        _mean_of_defined(f1),
        _mean_of_defined(areas),
        np.abs(sums[3 * classes :]).sum(axis=0) / total,
    )
    return np.concatenate([np.stack(scalars), sensitivity, specificity])


def _mean_of_defined(values: np.ndarray) -> np.ndarray:
    """(R,) means over the first axis, NaN left out."""
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(defined, values, 0).sum(axis=0) / defined.sum(axis=0)


def _interval(row: np.ndarray, resampled: bool) -> Interval:
    """The value in the first column and the percentiles of the resamples where the figure is defined."""
    defined = row[1:][~np.isnan(row[1:])]
    if not resampled or not len(defined):
        return Interval(float(row[0]), float("nan"), float("nan"))
    low, high = np.percentile(defined, (2.5, 97.5))
    return Interval(float(row[0]), float(low), float(high))


def _confusion(probabilities: np.ndarray, labels: np.ndarray) -> tuple[tuple[float, ...], ...]:
    epochs, _, classes = probabilities.shape
    cells = (labels * classes + probabilities.argmax(axis=2)).ravel()
    counts = np.bincount(cells, minlength=classes**2).reshape(classes, classes) / epochs
    return tuple(tuple(row) for row in counts.tolist())


def _reliability(probabilities: np.ndarray, labels: np.ndarray) -> tuple[Bin, ...]:
    confidence = probabilities.max(axis=2).ravel()
    hit = (probabilities.argmax(axis=2) == labels).ravel()
    where = _bins(confidence)
    counts = np.bincount(where, minlength=BINS)
    with np.errstate(invalid="ignore"):
        confidences = np.bincount(where, confidence, BINS) / counts
        accuracies = np.bincount(where, hit, BINS) / counts
    rows = zip(confidences.tolist(), accuracies.tolist(), (counts / len(probabilities)).tolist(), strict=True)
    return tuple(Bin(*row) for row in rows)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and np.isnan(value) else value
