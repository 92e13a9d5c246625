"""Forward correction: the network predicts the true class, a matrix turns that into the given one.

Patrini et al., CVPR 2017, arXiv:1609.03683, theorem 2 and section 4.3: -log (T^T p) of the given label, where
T[i, j] = P(given j | true i) is estimated after a warm-up by cross entropy: row i is the prediction for the
image that the network is most sure to be of class i (the 97th percentile of those that it takes for i, which
one outlier does not decide).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from noisyssl.config import require
from noisyssl.losses.base import Loss
from noisyssl.objective import Given, Predict


class ForwardCorrection(Loss):
    """Cross entropy until `warmup` epochs are over, then through the estimated matrix."""

    transition: Tensor
    epochs: Tensor

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        warmup: int = 5
        """Epochs of cross entropy before the matrix is estimated; at most a third of the training."""
        percentile: float = 97.0
        """Of a class's probability over the training images: where its row of the matrix is read."""

        def __post_init__(self) -> None:
            require(self.warmup >= 1, "train.forward.warmup", self.warmup, "at least 1")
            require(0 < self.percentile <= 100, "train.forward.percentile", self.percentile, "in (0, 100]")

    def __init__(self, config: Config, given: Given) -> None:
        super().__init__(config, given)
        self.train_rows, self.warmup = given.train, given.at_most_a_third(config.warmup)
        self.register_buffer("transition", torch.eye(given.classes))
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64))

    def before_epoch(self, predict: Predict) -> None:
        if int(self.epochs) == self.warmup:
            logits = torch.from_numpy(predict(self.train_rows)).double()
            found = estimate(logits.softmax(1).numpy(), self.config.percentile)
            self.transition.copy_(torch.from_numpy(found))
        self.epochs += 1

    def formula(self, logits: Tensor, label: Tensor, index: Tensor) -> Tensor:
        through = self.transition.log().T[label]  # (B, K): log P(given = label | true = k)
        return -(logits.log_softmax(1) + through).logsumexp(1).mean()  # in logarithms: p may underflow


def estimate(probabilities: np.ndarray, percentile: float) -> np.ndarray:
    """(K, K) transition matrix from the (N, K) predictions of a network that learnt the given labels."""
    rows, chosen = [], probabilities.argmax(1)
    for one in range(probabilities.shape[1]):
        own = np.flatnonzero(chosen == one)  # else a rare class would be read off an image of another one
        if not len(own):
            own = np.array([probabilities[:, one].argmax()])
        order = own[np.argsort(probabilities[own, one], kind="stable")]
        rows.append(probabilities[order[int(np.ceil(percentile / 100 * len(order))) - 1]])
    found = np.stack(rows)
    return found / found.sum(1, keepdims=True)
