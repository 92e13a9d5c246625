"""Co-teaching: two networks; each learns on the samples of a batch that the other one finds easy.

Han et al., NeurIPS 2018, arXiv:1804.06872, algorithm 1: of a batch, the share 1 - R(t) with the smallest
losses is handed to the other network, R(t) = rate * min(t / ramp, 1) in epochs. The rate of wrong labels that
the paper is told is estimated here after a warm-up, if none is given: see `noisyssl.mixture`.
"""

import math
from dataclasses import dataclass
from typing import Any

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

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        rate: str = "auto"
        """Share of wrong labels: auto estimates it, a number in [0, 1) is knowledge that reality lacks."""
        warmup: int = 5
        """Epochs before the rate is estimated, on all samples; without auto there are none.

        At most a third of the training, like `ramp`.
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
        if self.config.rate == "auto" and int(self.epochs) == self.warmup:
            assert self.given.labels is not None
            labels = self.given.labels[self.given.train]
            known = labels >= 0
            logits = predict(self.given.train[known])
            rate, error = mixture.noise_rate(mixture.cross_entropies(logits, labels[known]))
            self.rate.fill_(rate)
            self.error.fill_(error)
        self.epochs += 1
        self._forgotten = None

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
