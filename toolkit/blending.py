"""Blends of two images of a batch: how much of each, and which is the other one."""

import numpy as np
import torch
from torch import Tensor

STEPS = 1024
"""Places at which the inverse of the Beta distribution is tabulated."""


def beta_quantiles(alpha: float) -> Tensor:
    """(STEPS + 1,) float32 quantiles of Beta(alpha, alpha), which turn uniform numbers into shares."""
    from scipy.stats import beta  # comes with scikit-learn

    return torch.from_numpy(beta.ppf(np.linspace(0, 1, STEPS + 1), alpha, alpha)).float()


def partners(numbers: Tensor, quantiles: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) share of each image's own in its blend, and (B,) the place of the image that it is blended with.

    Partners are the batch in the order of a random number of each: every image is one's partner.

    Args:
        numbers: (B, 2) uniform in [0, 1), functions of each sample's key.
        quantiles: see `beta_quantiles`.
    """
    at = numbers[:, 0] * STEPS
    low = at.long().clamp(max=STEPS - 1)
    share = torch.lerp(quantiles[low], quantiles[low + 1], at - low)
    return share, numbers[:, 1].argsort(stable=True)


def blended(values: Tensor, share: Tensor, partner: Tensor) -> Tensor:
    """The blends of (B, ...) values: share * value + (1 - share) * the partner's value."""
    own = share.view(-1, *[1] * (values.ndim - 1))
    return own * values + (1 - own) * values[partner]
