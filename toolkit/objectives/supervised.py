"""One classifier, one robust loss on the given labels."""

from typing import Any

import torch
from torch import Tensor, nn

from noisyssl.batch import Batch, Terms
from noisyssl.classifier import Classifier
from noisyssl.losses.base import Loss
from noisyssl.objective import Given, Objective, Predict


class Supervised(Objective):
    """Minimises `loss(logits, given label, index)` of one view."""

    divisible = True

    def __init__(self, network: Classifier, config: Any, given: Given, *, loss: type[Loss]) -> None:
        super().__init__()
        self.network = network
        self.loss = loss(config, given)

    def forward(self, batch: Batch) -> Terms:
        assert batch.label is not None
        logits = self.network(batch.views[0])
        loss = self.loss(logits, batch.label, batch.index)
        with torch.no_grad():
            agreement = (logits.argmax(1) == batch.label).float().mean()
        return {"loss": loss, "agreement": agreement}

    def before_epoch(self, predict: Predict) -> None:
        self.loss.before_epoch(predict)

    def after_forward(self) -> None:
        self.loss.after_forward()

    def after_step(self, progress: float, ok: Tensor) -> None:
        self.loss.after_step(ok)

    def facts(self) -> dict[str, Any]:
        return self.loss.facts()

    def classifier(self) -> nn.Module:
        """The module that is evaluated and exported."""
        return self.network
