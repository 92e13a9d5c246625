"""MixUp: the network learns on blends of two images, with the blend of their labels.

Zhang et al., ICLR 2018, arXiv:1710.09412: x = l x_a + (1 - l) x_b and the same for the labels, l from
Beta(alpha, alpha). Each sample has its own l and partner, functions of its key: a resumed run blends as the
first one did.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from noisyssl.batch import Batch, Terms
from noisyssl.blending import beta_quantiles, blended, partners
from noisyssl.classifier import Classifier
from noisyssl.config import require
from noisyssl.objective import Given, Objective
from noisyssl.philox import uniform

STREAM = 1
"""Of a sample's key; streams from 65,536 on belong to the loader."""


class MixUp(Objective):
    """Cross entropy on blends; evaluation sees plain images."""

    quantiles: Tensor

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        alpha: float = 1.0
        """Of the Beta distribution: 1 draws l uniformly, small values blend little."""

        def __post_init__(self) -> None:
            require(self.alpha > 0, "train.mixup.alpha", self.alpha, "above 0")

    def __init__(self, network: Classifier, config: Config, given: Given) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("quantiles", beta_quantiles(config.alpha))

    def forward(self, batch: Batch) -> Terms:
        assert batch.label is not None
        share, partner = self.draw(batch.key)
        logits = self.network(blended(batch.views[0].float(), share, partner))
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            own = cross_entropy(logits, batch.label, reduction="none")
            other = cross_entropy(logits, batch.label[partner], reduction="none")
            loss = (share * own + (1 - share) * other).mean()
        with torch.no_grad():
            agreement = (logits.argmax(1) == batch.label).float().mean()
        return {"loss": loss, "agreement": agreement}

    def draw(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) share of each sample's own image, and (B,) the place of its partner."""
        return partners(uniform(key, STREAM, 2), self.quantiles)

    def classifier(self) -> Classifier:
        """The module that is evaluated and exported."""
        return self.network
