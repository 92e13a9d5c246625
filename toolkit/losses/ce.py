"""Plain cross entropy: the baseline that memorises wrong labels."""

from torch import Tensor
from torch.nn.functional import cross_entropy

from noisyssl.losses.base import Loss


class CrossEntropy(Loss):
    """Mean of -log p of the given class."""

    def formula(self, logits: Tensor, label: Tensor, index: Tensor) -> Tensor:
        return cross_entropy(logits, label)
