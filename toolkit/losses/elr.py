"""Early-learning regularisation: what the network said of a sample before holds it back from memorising.

Liu et al., NeurIPS 2020, arXiv:2007.00151, eq. 6 and 7: CE + strength * mean log(1 - <p, t>), where the
target t of a sample is the moving average of its own predictions. With `ema` and `mixup` it is ELR+ of
section 4.4, with one network: see `noisyssl.objectives.elr`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from noisyssl.config import require
from noisyssl.losses.base import Loss
from noisyssl.objective import Given

FLOOR = 1e-4
"""Probabilities are kept this far from 0 and 1, as in the authors' code: the logarithm stays finite."""


class EarlyLearning(Loss):
    """Cross entropy plus the regulariser; remembers (N, K) targets by row of `samples.csv`."""

    targets: Tensor

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        strength: float = 3.0
        """Weight of the regulariser (lambda); 3 for 10 classes in the paper, 7 for 100."""
        memory: float = 0.7
        """Share of the old target that stays (beta); 0.7 and 0.9."""
        ema: float = 0.0
        """Decay of an averaged network, which gives the targets and is evaluated; ELR+: 0.997, 0 is off."""
        mixup: float = 0.0
        """Of the Beta distribution of MixUp on images, labels and targets; ELR+ takes 1, 0 is off."""

        def __post_init__(self) -> None:
            require(self.strength >= 0, "train.elr.strength", self.strength, "0 or above")
            require(0 <= self.memory < 1, "train.elr.memory", self.memory, "in [0, 1)")
            require(0 <= self.ema < 1, "train.elr.ema", self.ema, "in [0, 1)")
            require(self.mixup >= 0, "train.elr.mixup", self.mixup, "0 (off) or above")

    def __init__(self, config: Config, given: Given) -> None:
        super().__init__(config, given)
        self.register_buffer("targets", torch.zeros(given.count, given.classes))

    def formula(self, logits: Tensor, label: Tensor, index: Tensor) -> Tensor:
        return cross_entropy(logits, label) + self.held(logits, self.remembered(logits, index))

    def remembered(self, logits: Tensor, index: Tensor) -> Tensor:
        """(B, K) targets of these samples, with what is now said of them joined in."""
        target = self.targets[index]
        if self.training:
            p = logits.detach().softmax(1).clamp(FLOOR, 1 - FLOOR)
            now = p / p.sum(1, keepdim=True)
            target = self.config.memory * target + (1 - self.config.memory) * now
            self.remember(index, targets=target)
        return target

    def held(self, logits: Tensor, target: Tensor) -> Tensor:
        """The regulariser, with its weight."""
        p = logits.softmax(1).clamp(FLOOR, 1 - FLOOR)
        return self.config.strength * torch.log(1 - (p * target).sum(1)).mean()
