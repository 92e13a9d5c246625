"""The probe of a frozen backbone: train teaches, test is measured, beside what colour alone can tell."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from noisyssl import baselines, probe
from noisyssl.errors import ConfigError, DataError
from noisyssl.evaluation import figures
from noisyssl.pipelines.embed import Frozen, features_of
from noisyssl.pipelines.labels import truth_of
from noisyssl.pipelines.samples import Samples


def measure(
    frozen: Frozen,
    samples: Samples,
    device: torch.device,
    threads: int,
    *,
    labels: str = "true",
    k: int = probe.NEIGHBOURS,
    progress: Callable[[int, int], None] | None = None,
    scores: dict[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Test figures of k-NN, linear probe and the colour baselines, and the spread of the features.

    Always measured on true labels where they are known. JSON-able.

    Args:
        labels: what teaches: `true` labels where they are known, or the `given` ones.
        scores: receives the (N, K) log-probabilities of the test images, `knn` and `linear`.

    Raises:
        ConfigError: `labels` or `k` cannot be.
        DataError: a split is empty, or a class of the test split is not taught.
    """
    if labels not in ("true", "given"):
        raise ConfigError(f"--labels is {labels!r}; choose true or given.")
    truth, train, test = truth_of(samples), samples.where("train"), samples.where("test")
    taught = (truth if labels == "true" else samples.labels)[train]
    _must_fit(samples, taught, truth[test])
    if not 1 <= k <= len(train):
        raise ConfigError(f"--k is {k}; it must lie in 1-{len(train)}, the number of training images.")
    colours = (baselines.mean_rgb, baselines.colour_histogram)
    both = np.append(train, test)
    features, *shallow = features_of(frozen, samples, both, device, threads, colours, progress)
    cut, classes, groups = len(train), len(samples.classes), np.array(samples.groups)
    votes = probe.knn(features[:cut], taught, features[cut:], classes, k)
    fitted, strength = probe.linear(features[:cut], taught, groups[train], features[cut:], classes)
    if scores is not None:
        scores |= {"knn": votes, "linear": fitted}

    def measured(logits: np.ndarray) -> dict[str, Any]:
        return figures(logits, truth[test], groups[test], samples.classes).to_json()

    return {
        "weights": frozen.what,
        "classes": list(samples.classes),
        "images": {"train": len(train), "test": len(test)},
        "labels": {"taught": _kind(samples, train, labels), "measured": _kind(samples, test, "true")},
        "k": k,
        "strength": strength,
        "knn": measured(votes),
        "linear": measured(fitted),
        "baselines": {
            colour.__name__: measured(baselines.fit_predict(found[:cut], taught, found[cut:], classes))
            for colour, found in zip(colours, shallow, strict=True)
        },
        "dimensions": features.shape[1],
        **asdict(probe.spread(features[:cut])),
    }


def _must_fit(samples: Samples, taught: np.ndarray, measured: np.ndarray) -> None:
    for split, rows in (("train", taught), ("test", measured)):
        if not len(rows):
            raise DataError(
                f"{samples.root} has no {split} images; a probe learns from train and is measured on test. "
                "Add some, or leave the split column out."
            )
    names = [samples.classes[label] for label in np.unique(taught)]
    for label in np.setdiff1d(measured, taught):
        count = int((measured == label).sum())
        raise DataError(
            f"class {samples.classes[label]!r} ({count:,} images) is in test but is not taught by train, "
            f"which has {', '.join(names)}. Add training images of it, or leave it out."
        )
    if len(names) < 2:
        raise DataError(f"train teaches one class only ({names[0]!r}); a probe needs two.")


def _kind(samples: Samples, rows: np.ndarray, labels: str) -> str:
    """Which labels these are, for a person: `given`, `true`, or how many of each."""
    known = 0 if samples.true_labels is None else int((samples.true_labels[rows] >= 0).sum())
    if labels == "given" or not known:
        return "given"
    return "true" if known == len(rows) else f"{known:,} true, {len(rows) - known:,} given"
