"""Label smoothing: each given label keeps 1 - epsilon, all classes share epsilon.

Szegedy et al., CVPR 2016, arXiv:1512.00567, section 7; under label noise Lukasik et al., ICML 2020,
arXiv:2003.02819.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cross_entropy

from noisyssl.config import require
from noisyssl.losses.base import Loss


class LabelSmoothing(Loss):
    """Cross entropy with (1 - epsilon) one-hot + epsilon / K."""

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        epsilon: float = 0.1
        """Weight that is shared by all classes, in [0, 1)."""

        def __post_init__(self) -> None:
            require(0 <= self.epsilon < 1, "train.smoothing.epsilon", self.epsilon, "in [0, 1)")

    def formula(self, logits: Tensor, label: Tensor, index: Tensor) -> Tensor:
        return cross_entropy(logits, label, label_smoothing=self.config.epsilon)
