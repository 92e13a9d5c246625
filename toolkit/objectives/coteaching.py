"""Co-teaching: two networks; each learns on the samples of a batch that the other one finds easy.

Han et al., NeurIPS 2018, arXiv:1804.06872, algorithm 1: of a batch, the share 1 - R(t) with the smallest
losses is handed to the other network, R(t) = rate * min(t / ramp, 1) in epochs. The rate of wrong labels
that the paper is told is estimated here after a warm-up, if none is given: by a mixture (`noisyssl.mixture`)
of the mean losses over the second half of its epochs. One epoch's losses will not do: a network that still
learns fast changes its mind about whole classes: 13 and 71 % came out where half of the labels were wrong.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from noisyssl import mixture
from noisyssl.batch import Batch, Terms
from noisyssl.classifier import Classifier
from noisyssl.config import require
from noisyssl.objective import Given, Objective, Predict


class CoTeaching(Objective):
    """Both networks see the same views; the first one is evaluated and exported."""

    rate: Tensor
    error: Tensor
    epochs: Tensor
    losses: Tensor
    """(M,) sums of the losses of the labelled training samples, over the looks so far."""

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        rate: str = "auto"
        """Share of wrong labels: auto estimates it, a number in [0, 1) is knowledge that reality lacks."""
        warmup: int = 5
        """Epochs on all samples before the rate is estimated; without auto there are none.

        Long enough to learn most of the classes. At most a third of the training, like `ramp`.
        """
        ramp: int = 10
        """Epochs over which the forgotten share rises to the rate (T_k)."""

        def __post_init__(self) -> None:
            if self.rate != "auto":
                try:
                    known = 0 <= float(self.rate) < 1
                except ValueError:
                    known = False
                require(known, "train.coteaching.rate", self.rate, "auto or a number in [0, 1)")
            require(self.warmup >= 1, "train.coteaching.warmup", self.warmup, "at least 1")
            require(self.ramp >= 1, "train.coteaching.ramp", self.ramp, "at least 1")

    def __init__(self, network: Classifier, config: Config, given: Given) -> None:
        super().__init__()
        assert given.another is not None
        self.network, self.other = network, given.another()
        self.config, self.given = config, given
        self.warmup, self.ramp = given.at_most_a_third(config.warmup), given.at_most_a_third(config.ramp)
        told = 0.0 if config.rate == "auto" else float(config.rate)
        self.register_buffer("rate", torch.tensor(told, dtype=torch.float64))
        self.register_buffer("error", torch.zeros((), dtype=torch.float64))
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64))
        looks = len(self._labelled()) if config.rate == "auto" else 0
        self.register_buffer("losses", torch.zeros(looks, dtype=torch.float64))
        self._forgotten: float | None = None

    def forward(self, batch: Batch) -> Terms:
        assert batch.label is not None
        kept = max(1, math.ceil((1 - self.forgotten()) * len(batch.label) - 1e-9))
        first, second = self.network(batch.views[0]), self.other(batch.views[0])
        with torch.autocast(first.device.type, enabled=False):
            losses = [
                cross_entropy(logits.float(), batch.label, reduction="none") for logits in (first, second)
            ]
            easy = [loss.detach().argsort(stable=True)[:kept] for loss in losses]
            loss = losses[0][easy[1]].mean() + losses[1][easy[0]].mean()
        with torch.no_grad():
            agreement = (first.argmax(1) == batch.label).float().mean()
            apart = (first.argmax(1) != second.argmax(1)).float().mean()
        return {"loss": loss, "agreement": agreement, "networks_differ": apart}

    def before_epoch(self, predict: Predict) -> None:
        if self.config.rate == "auto" and self.warmup // 2 < int(self.epochs) <= self.warmup:
            assert self.given.labels is not None
            rows = self._labelled()
            losses = mixture.cross_entropies(predict(rows), self.given.labels[rows])
            self.losses += torch.from_numpy(losses).to(self.losses)
            if int(self.epochs) == self.warmup:
                rate, error = mixture.noise_rate(self.losses.cpu().numpy())  # it takes sums as it takes means
                self.rate.fill_(rate)
                self.error.fill_(error)
        self.epochs += 1
        self._forgotten = None

    def _labelled(self) -> np.ndarray:
        """(M,) rows of the training split that have a label."""
        assert self.given.labels is not None
        train = self.given.train
        return train[self.given.labels[train] >= 0]

    def forgotten(self) -> float:
        """R(t) of the epoch that runs; buffers are read once an epoch, so that no step waits for the GPU."""
        if self._forgotten is None:
            begun = max(0, int(self.epochs) - 1)  # epochs that are over
            if self.config.rate == "auto":
                begun -= self.warmup
            self._forgotten = float(self.rate) * min(max(begun, 0) / self.ramp, 1.0)
        return self._forgotten

    def facts(self) -> dict[str, Any]:
        """The noise rate, its standard error if it was estimated, whether it was told (oracle knowledge)."""
        told = self.config.rate != "auto"
        return {"noise_rate": float(self.rate), "error": None if told else float(self.error), "oracle": told}

    def apart(self) -> tuple[nn.Module, ...]:
        return self.network, self.other

    def classifier(self) -> nn.Module:
        """The module that is evaluated and exported."""
        return self.network
