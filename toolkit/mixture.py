"""Two populations of losses, those of right and of wrong labels: a mixture of two normal distributions.

Arazo et al., ICML 2019, arXiv:1904.11238, with the normal distributions of DivideMix (Li et al., ICLR 2020,
arXiv:2002.07394, section 3.1): a network that has not memorised yet has small losses on right labels.
"""

import numpy as np


def cross_entropies(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(N,) float64 losses of (N, K) logits."""
    logits = logits.astype(np.float64)
    top = logits.max(1)
    whole = top + np.log(np.exp(logits - top[:, None]).sum(1))
    return whole - logits[np.arange(len(labels)), labels]


def clean_probability(losses: np.ndarray) -> np.ndarray:
    """(N,) posterior of the component with the smaller mean; 1 for all where the losses do not differ.

    Losses are scaled to [0, 1] first, as in DivideMix's code, whose settings these are.
    """
    from sklearn.mixture import GaussianMixture

    low, high = losses.min(), losses.max()
    if not high > low:
        return np.ones(len(losses))
    scaled = ((losses - low) / (high - low))[:, None]
    mixture = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=0).fit(scaled)
    return mixture.predict_proba(scaled)[:, mixture.means_.argmin()]


def noise_rate(losses: np.ndarray) -> tuple[float, float]:
    """Estimated share of wrong labels, the mean posterior of the other component, and its standard error."""
    return rate_of(clean_probability(losses))


def rate_of(clean: np.ndarray) -> tuple[float, float]:
    """`noise_rate` from the (N,) probabilities that labels are right."""
    wrong = 1 - clean
    return float(wrong.mean()), float(wrong.std() / np.sqrt(len(wrong)))
