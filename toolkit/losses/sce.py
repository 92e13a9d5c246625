"""Symmetric cross entropy: a second term reads the label's distribution as the prediction.

Wang et al., ICCV 2019, arXiv:1908.06112, eq. 7: alpha CE + beta RCE, where RCE = -sum_k p_k log y_k and log 0
is a constant A. With one-hot labels RCE = -A (1 - p), a scaled mean absolute error. A = -4 as in the paper's
text; a widely used code clamps labels at 1e-4 instead, which is A = -9.2.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cross_entropy

from noisyssl.config import require
from noisyssl.losses.base import Loss


class SymmetricCrossEntropy(Loss):
    """alpha * CE + beta * (-A) * (1 - p)."""

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        alpha: float = 0.1
        """Weight of cross entropy; the paper takes 0.1 for 10 classes and 6 for 100."""
        beta: float = 1.0
        """Weight of the reverse term; 1 and 0.1."""
        log_zero: float = -4.0
        """A: what the logarithm of 0 counts as."""

        def __post_init__(self) -> None:
            require(self.alpha >= 0, "train.sce.alpha", self.alpha, "0 or above")
            require(self.beta >= 0, "train.sce.beta", self.beta, "0 or above")
            require(self.log_zero < 0, "train.sce.log_zero", self.log_zero, "below 0")

    def formula(self, logits: Tensor, label: Tensor, index: Tensor) -> Tensor:
        p = logits.softmax(1).gather(1, label[:, None])
        reverse = -self.config.log_zero * (1 - p).mean()
        return self.config.alpha * cross_entropy(logits, label) + self.config.beta * reverse
