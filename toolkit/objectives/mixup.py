"""MixUp: the network learns on blends of two images, with the blend of their labels.

Zhang et al., ICLR 2018, arXiv:1710.09412: x = l x_a + (1 - l) x_b and the same for the labels, l from
Beta(alpha, alpha). Each sample has its own l and partner, functions of its key: a resumed run blends as the
first one did.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from noisyssl.batch import Batch, Terms
from noisyssl.classifier import Classifier
from noisyssl.config import require
from noisyssl.objective import Given, Objective
from noisyssl.philox import uniform

STREAM = 1
"""Of a sample's key; streams from 65,536 on belong to the loader."""
STEPS = 1024
"""Places at which the inverse of the Beta distribution is tabulated."""


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
        from scipy.stats import beta  # comes with scikit-learn

        super().__init__()
        self.network = network
        places = np.linspace(0, 1, STEPS + 1)
        self.register_buffer(
            "quantiles", torch.from_numpy(beta.ppf(places, config.alpha, config.alpha)).float()
        )

    def forward(self, batch: Batch) -> Terms:
        assert batch.label is not None
        share, partner = self.draw(batch.key)
        images = batch.views[0].float()
        wide = share[:, None, None, None]
        logits = self.network(wide * images + (1 - wide) * images[partner])
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            own = cross_entropy(logits, batch.label, reduction="none")
            other = cross_entropy(logits, batch.label[partner], reduction="none")
            loss = (share * own + (1 - share) * other).mean()
        with torch.no_grad():
            agreement = (logits.argmax(1) == batch.label).float().mean()
        return {"loss": loss, "agreement": agreement}

    def draw(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) share of each sample's own image, and (B,) the place of the one that it is blended with.

        Partners are the batch in the order of a random number of each: every image is one's partner.
        """
        numbers = uniform(key, STREAM, 2)
        at = numbers[:, 0] * STEPS
        low = at.long().clamp(max=STEPS - 1)
        share = torch.lerp(self.quantiles[low], self.quantiles[low + 1], at - low)
        return share, numbers[:, 1].argsort(stable=True)

    def classifier(self) -> Classifier:
        """The module that is evaluated and exported."""
        return self.network
