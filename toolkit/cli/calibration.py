"""Which training images set the scales of a lower precision."""

from typing import TYPE_CHECKING

from noisyssl.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    from noisyssl.pipelines.samples import Samples

FEWEST = 32


def calibration_rows(samples: "Samples", count: int, seed: int) -> "np.ndarray":
    """(M,) up to `count` training rows, as many of each given class as there are, drawn by `seed`.

    Classes take turns, so that a rare one is seen as well: its activations are to be represented too.

    Raises:
        DataError: there are fewer than 32 training images, or they have a single class.
    """
    import numpy as np

    train = samples.where("train")
    labels = samples.labels[train]
    known = labels >= 0
    classes = np.unique(labels[known])
    if len(train) < FEWEST:
        raise DataError(
            f"the training split has {len(train)} images; calibration needs {FEWEST} or more. "
            "Add images, or export --precision fp32."
        )
    if len(classes) < 2:
        raise DataError(
            f"the training split has {len(classes)} class; calibration on one would miss what the others do. "
            "Add images of another class, or export --precision fp32."
        )
    generator = np.random.default_rng(seed)
    turn = np.full(len(train), len(train))
    for label in classes:
        rows = generator.permutation(np.flatnonzero(labels == label))
        turn[rows] = np.arange(len(rows))
    chosen = np.argsort(turn, kind="stable")[: min(count, int(known.sum()))]
    return np.sort(train[chosen])
