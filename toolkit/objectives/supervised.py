"""One classifier, one robust loss on the given labels."""

from typing import Any

import torch
from torch import nn

from noisyssl.batch import Batch, Terms
from noisyssl.classifier import Classifier
from noisyssl.objective import Objective


class Supervised(Objective):
    """Minimises `loss(logits, given label, index)` of one view."""

    divisible = True

    def __init__(self, network: Classifier, config: Any, *, loss: type[nn.Module]) -> None:
        super().__init__()
        self.network = network
        self.loss = loss(config)

    def forward(self, batch: Batch) -> Terms:
        assert batch.label is not None
        logits = self.network(batch.views[0])
        loss = self.loss(logits, batch.label, batch.index)
        with torch.no_grad():
            agreement = (logits.argmax(1) == batch.label).float().mean()
        return {"loss": loss, "agreement": agreement}

    def classifier(self) -> Classifier:
        """The module that is evaluated and exported."""
        return self.network
