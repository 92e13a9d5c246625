"""Label noise that depends on the image: Xia et al., NeurIPS 2020, arXiv:2006.07836, algorithm 2.

Each sample has its own flip rate, from a normal distribution of standard deviation 0.1 cut to [0, 1], and its
own preferences among the other classes: a random projection of its features, one projection per class. Ours
differs in what lets it be used at 224 pixels: features are standardised and the projection scaled to unit
variance, since on raw pixels the softmax gives one wrong class all the weight; and the mean of the cut
distribution is the asked rate.
"""

import numpy as np

from noisyssl.philox import MASK, philox

DEVIATION = 0.1
"""Of the flip rates, as in the paper."""
STREAM = 0x696E7374
"""Third word of the counter of the flip rates."""


def shares(
    features: np.ndarray, labels: np.ndarray, index: np.ndarray, classes: int, rate: float, seed: int
) -> np.ndarray:
    """(M, C) float64 P(given = j) of each of M samples; rows sum to 1.

    Args:
        features: (M, S) of any scale: pixels of a small copy of the image, or a frozen network's features.
        labels: (M,) int64 true classes; rows of -1 get the class 0's and are for nobody.
        index: (M,) rows of the table: a sample's own rate is a function of (seed, index).
        classes: C.
        rate: mean share of wrong labels, in [0, 1).
        seed: of rates and projections.
    """
    own = np.maximum(labels, 0)
    x = features - features.mean(0)
    deviation = x.std(0)
    x = x[:, deviation > 1e-9] / deviation[deviation > 1e-9]
    generator = np.random.Generator(np.random.Philox(key=seed & MASK))
    scores = np.empty((len(x), classes))
    for one in range(classes):
        projection = generator.standard_normal((x.shape[1], classes)) / np.sqrt(max(1, x.shape[1]))
        scores[own == one] = x[own == one] @ projection
    rows = np.arange(len(x))
    scores[rows, own] = -np.inf
    odds = np.exp(scores - scores.max(1, keepdims=True))
    flip = flip_rates(index, rate, seed)
    out = flip[:, None] * odds / odds.sum(1, keepdims=True)
    out[rows, own] = 1 - flip
    return out


def flip_rates(index: np.ndarray, rate: float, seed: int) -> np.ndarray:
    """(M,) probability that each label flips: a normal distribution cut to [0, 1] whose mean is `rate`."""
    from scipy.optimize import brentq  # both come with scikit-learn
    from scipy.stats import truncnorm

    if rate == 0:
        return np.zeros(len(index))
    index = np.asarray(index, np.int64)
    draw = philox((index & MASK, index >> 32, STREAM, 0), (seed & MASK, seed >> 32 & MASK))[0]
    uniform = (np.asarray(draw) + 0.5) * 2.0**-32

    def cut(centre: float) -> tuple[float, float]:
        return -centre / DEVIATION, (1 - centre) / DEVIATION

    centre = brentq(lambda c: truncnorm.mean(*cut(c), loc=c, scale=DEVIATION) - rate, -2.0, 3.0)
    return truncnorm.ppf(uniform, *cut(centre), loc=centre, scale=DEVIATION)
