"""What frozen features are worth: k-NN, a linear probe, and whether they still tell images apart.

NumPy and scikit-learn on arrays; `noisyssl.evaluation.figures` makes figures of the predictions.

- k-NN: votes of the nearest training features by cosine; Wu et al., CVPR 2018, arXiv:1805.01978, section 3.4,
  with the settings of DINO's evaluation (Caron et al., ICCV 2021, arXiv:2104.14294).
- Linear probe: multinomial logistic regression whose penalty is chosen on images held out of the training
  split, as in Kornblith et al., CVPR 2019, arXiv:1805.08974.
- Effective rank: Roy & Vetterli, EUSIPCO 2007; as a sign of collapse in Garrido et al., arXiv:2210.02885.
- Standard deviation of L2-normalised features: Chen & He (SimSiam), CVPR 2021, arXiv:2011.10566, section 4.1.
"""

from dataclasses import dataclass

import numpy as np

from noisyssl.baselines import LOWEST, fit_predict
from noisyssl.errors import ConfigError

NEIGHBOURS, TEMPERATURE = 20, 0.07
FEW = 10
"""Groups below which single rows are held out to choose the linear probe's penalty."""
STRENGTHS = tuple(10.0**exponent for exponent in range(-5, 1))
"""Values of scikit-learn's C, the inverse of the penalty, that the linear probe chooses from."""
CELLS = 16_000_000
"""Similarities held at once (64 MB)."""


def neighbours(queries: np.ndarray, bank: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(Q, k) int64 rows of `bank` with the largest cosine to each query, nearest first, and the cosines.

    Raises:
        ConfigError: k is not in 1 to the rows of `bank`.
    """
    if not 1 <= k <= len(bank):
        raise ConfigError(f"k is {k}; it must lie in 1-{len(bank)}, the number of labelled training images.")
    queries, bank = unit(queries), unit(bank)
    rows, cosines = np.zeros((len(queries), k), np.int64), np.zeros((len(queries), k), np.float32)
    step = max(1, CELLS // len(bank))
    for start in range(0, len(queries), step):
        part = slice(start, start + step)
        cosine = queries[part] @ bank.T
        found = np.sort(np.argpartition(-cosine, k - 1, axis=1)[:, :k], axis=1)
        values = np.take_along_axis(cosine, found, axis=1)
        order = np.argsort(-values, axis=1, kind="stable")
        rows[part] = np.take_along_axis(found, order, axis=1)
        cosines[part] = np.take_along_axis(values, order, axis=1)
    return rows, cosines


def knn(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    classes: int,
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> np.ndarray:
    """(N, K) float64 log-shares of the votes exp(cosine / temperature) of the k nearest; usable as logits.

    Training rows labelled -1 have no vote. With an infinite temperature all votes are equal.
    """
    known = labels >= 0
    near, cosine = neighbours(test, train[known], k)
    weight = np.exp((cosine.astype(np.float64) - 1) / temperature)  # "- 1": no overflow, the shares stay
    votes = np.zeros((len(test), classes))
    np.add.at(votes, (np.arange(len(test))[:, None], labels[known][near]), weight)
    shares = votes / votes.sum(axis=1, keepdims=True)
    return np.log(np.maximum(shares, np.exp(LOWEST)))


def linear(
    train: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    test: np.ndarray,
    classes: int,
    strengths: tuple[float, ...] = STRENGTHS,
) -> tuple[np.ndarray, float]:
    """(N, K) float64 log-probabilities of a logistic regression on standardised features, and its C.

    C is the one of `strengths` with the smallest log loss on a fifth of the training groups after fitting
    the others; then all training rows are fitted. Test rows choose nothing. Training rows labelled -1 are
    left out.

    Args:
        groups: (M,) names of the groups of the training rows, which are held out whole.
    """
    known = labels >= 0
    train, labels = train[known].astype(np.float64), labels[known]
    held = held_out(np.asarray(groups)[known], labels)
    if not held.any():  # two rows at most: nothing to choose by
        return fit_predict(train, labels, test, classes), 1.0
    answers = labels[held]
    losses = []
    for strength in strengths:
        scores = fit_predict(train[~held], labels[~held], train[held], classes, strength)
        losses.append(-float(scores[np.arange(len(answers)), answers].mean()))
    best = strengths[int(np.argmin(losses))]
    return fit_predict(train, labels, test.astype(np.float64), classes, best), best


def held_out(groups: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(M,) bool, True for every fifth group when groups are lined up by class and, inside it, by chance.

    Seeded; with fewer than `FEW` groups each row counts as its own.
    """
    names, first, group = np.unique(groups, return_index=True, return_inverse=True)
    if len(names) < FEW:
        first = group = np.arange(len(groups))
    order = np.lexsort((np.random.default_rng(0).random(len(first)), labels[first]))
    return np.isin(group, order[2::5])


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """How differently a network sees different images, from (N, D) features of N images."""

    effective_rank: float
    """Of the centred directions: 1 if they lie on a line, D if they vary equally in all dimensions."""
    std: float
    """Mean over dimensions of the standard deviation of the L2-normalised features."""
    full_std: float
    """1 / sqrt(D), the `std` of features that point everywhere equally."""

    def is_collapsed(self) -> bool:
        """Whether all images look alike to a network that has trained.

        Two signs. `std` below a twentieth of `full_std`: the mean cosine between images is about 0.997 or
        more. On real histology and X-rays, random networks gave 0.09 to 0.38 of `full_std`, methods that
        trained well 0.23 and more after one epoch; a loss that only attracts fell to 0.03, a learning rate
        50 times too high gave 0.004. `effective_rank` below 2: the images differ along a line, on which no
        three classes lie apart; it was 40 and more where training went well.
        """
        return self.std < 0.05 * self.full_std or self.effective_rank < 2


def spread(features: np.ndarray) -> Spread:
    """The spread of (N, D) features of N different images."""
    directions = unit(features).astype(np.float64)
    return Spread(
        effective_rank=effective_rank(directions - directions.mean(axis=0)),
        std=float(directions.std(axis=0).mean()),
        full_std=features.shape[1] ** -0.5,
    )


def effective_rank(matrix: np.ndarray) -> float:
    """Exponential of the entropy of the singular values over their sum (Roy & Vetterli); 0 of zeros."""
    matrix = np.asarray(matrix, dtype=np.float64)
    gram = matrix @ matrix.T if len(matrix) < matrix.shape[1] else matrix.T @ matrix
    singular = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0))
    if not singular.any():
        return 0.0
    share = singular / singular.sum()
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def flat_map(features: np.ndarray, seed: int = 0) -> np.ndarray:
    """(N, 2) float32 t-SNE of L2-normalised features, started from their principal components; seeded.

    Van der Maaten & Hinton, JMLR 2008. Empty (0, 2) for fewer than 10 rows, or where all are equal.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # a dependency of scikit-learn

    directions = unit(features)
    if len(directions) < 10 or np.ptp(directions, axis=0).max() < 1e-6:
        return np.zeros((0, 2), np.float32)
    width = min(50, *directions.shape)  # as scikit-learn advises: less noise, less work
    reduced = PCA(width, svd_solver="full").fit_transform(directions)
    perplexity = min(30.0, (len(directions) - 1) / 3)
    with threadpool_limits(1):  # a thousand steps of tiny parallel loops: on a busy machine threads only wait
        return TSNE(init="pca", perplexity=perplexity, max_iter=500, random_state=seed).fit_transform(reduced)


def unit(features: np.ndarray) -> np.ndarray:
    """(N, D) float32 rows of length 1; rows of zeros stay."""
    features = np.asarray(features, dtype=np.float32)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
