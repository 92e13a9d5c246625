"""Generalized cross entropy: between cross entropy (q -> 0) and mean absolute error (q = 1).

Zhang & Sabuncu, NeurIPS 2018, arXiv:1805.07836, eq. 5; not truncated.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from noisyssl.errors import ConfigError
from noisyssl.losses.base import Loss
from noisyssl.objective import Given


class GeneralizedCrossEntropy(Loss):
    """Mean of (1 - p**q) / q: a confidently contradicted label pulls with weight p**q instead of 1."""

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        """What the paper calls q."""

        q: float = 0.7
        """Robustness: near 0 is cross entropy, 1 is mean absolute error."""

        def __post_init__(self) -> None:
            """Raises ConfigError for a value outside (0, 1]."""
            if not 0.0 < self.q <= 1.0:
                raise ConfigError(
                    f"train.gce.q is {self.q}; it must lie in (0, 1]. "
                    "Use --objective ce for plain cross entropy."
                )

    def __init__(self, config: Config, given: Given) -> None:
        super().__init__(config, given)
        self.q = config.q

    def formula(self, logits: Tensor, label: Tensor, index: Tensor) -> Tensor:
        log_p = logits.log_softmax(dim=1).gather(1, label[:, None])
        return -(torch.expm1(self.q * log_p) / self.q).mean()  # from log p: p**q has no gradient once p is 0
