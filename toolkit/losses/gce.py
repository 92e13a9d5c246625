"""Generalized cross entropy: between cross entropy (q -> 0) and mean absolute error (q = 1).

Zhang & Sabuncu, NeurIPS 2018, arXiv:1805.07836, eq. 5; with `truncate` the truncated loss of section 3.3:
every some epochs the samples whose label has a probability below k are pruned, whose loss is then the
constant (1 - k**q) / q (algorithm 1, with the network as it is; the paper prunes by its best one so far).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from noisyssl.config import require
from noisyssl.errors import ConfigError
from noisyssl.losses.base import Loss
from noisyssl.mixture import cross_entropies
from noisyssl.objective import Given, Predict
from noisyssl.selection import no_class_starved


class GeneralizedCrossEntropy(Loss):
    """Mean of (1 - p**q) / q: a confidently contradicted label pulls with weight p**q instead of 1."""

    kept: Tensor
    refilled: Tensor
    epochs: Tensor

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        """What the paper calls q and k."""

        q: float = 0.7
        """Robustness: near 0 is cross entropy, 1 is mean absolute error."""
        truncate: float = 0.0
        """Samples whose label is less probable than this are pruned; the paper takes 0.5, 0 prunes none."""
        start: int = 40
        """Epochs before samples are pruned for the first time; at most a third of the training."""
        every: int = 10
        """Epochs from one pruning to the next; a sample may come back."""

        def __post_init__(self) -> None:
            """Raises ConfigError for a value outside its range."""
            if not 0.0 < self.q <= 1.0:
                raise ConfigError(
                    f"train.gce.q is {self.q}; it must lie in (0, 1]. "
                    "Use --objective ce for plain cross entropy."
                )
            require(0 <= self.truncate < 1, "train.gce.truncate", self.truncate, "in [0, 1)")
            require(self.start >= 1, "train.gce.start", self.start, "at least 1")
            require(self.every >= 1, "train.gce.every", self.every, "at least 1")

    def __init__(self, config: Config, given: Given) -> None:
        super().__init__(config, given)
        self.q, self.truncate, self.given = config.q, config.truncate, given
        self.start = given.at_most_a_third(config.start)
        if config.truncate:
            self.register_buffer("kept", torch.ones(given.count))
            self.register_buffer("refilled", torch.zeros(given.classes, dtype=torch.int64))
            self.register_buffer("epochs", torch.zeros((), dtype=torch.int64))

    def formula(self, logits: Tensor, label: Tensor, index: Tensor) -> Tensor:
        log_p = logits.log_softmax(dim=1).gather(1, label[:, None])[:, 0]
        losses = -torch.expm1(self.q * log_p) / self.q  # from log p: p**q has no gradient once p is 0
        if not self.truncate:
            return losses.mean()
        kept = self.kept[index]
        return (kept * losses + (1 - kept) * (1 - self.truncate**self.q) / self.q).mean()

    def before_epoch(self, predict: Predict) -> None:
        if not self.truncate:
            return
        over = int(self.epochs) - self.start
        if over >= 0 and over % self.config.every == 0:
            self.prune(predict)
        self.epochs += 1

    def prune(self, predict: Predict) -> None:
        """Keep the samples whose label has at least the probability k; of a class with too few the best."""
        assert self.given.labels is not None
        labels = self.given.labels[self.given.train]
        rows, labels = self.given.train[labels >= 0], labels[labels >= 0]
        losses = cross_entropies(predict(rows), labels)
        kept, refilled = no_class_starved(
            losses <= -math.log(self.truncate), losses, labels, self.given.classes
        )
        self.kept[torch.from_numpy(rows).to(self.kept.device)] = torch.from_numpy(kept).to(self.kept)
        self.refilled[refilled] += 1

    def facts(self) -> dict[str, Any]:
        """Share of the training samples that is pruned, and how often each class was refilled."""
        if not self.truncate:
            return {}
        rows = torch.from_numpy(self.given.train).to(self.kept.device)
        return {
            "pruned": float(1 - self.kept[rows].mean()),
            "refilled": {str(k): count for k, count in enumerate(self.refilled.tolist()) if count},
        }
