"""ELR and its options: targets from an averaged network, blended images; with both it is ELR+ of one network.

Liu et al., NeurIPS 2020, arXiv:2007.00151, section 4.4 and the authors' code. Their ELR+ trains two networks,
each with the targets of the other one's average; here the one network's own average gives them. The stage's
`train.ema` averages too, but what it averages nobody asks before the epoch is over.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from noisyssl.batch import Batch, Terms
from noisyssl.blending import beta_quantiles, blended, partners
from noisyssl.classifier import Classifier
from noisyssl.losses.elr import EarlyLearning
from noisyssl.momentum import follow, twin
from noisyssl.objective import Given, Objective
from noisyssl.objectives.supervised import Supervised
from noisyssl.philox import uniform

STREAM = 3
"""Of a sample's key; MixUp has 1, DivideMix 2, streams from 65,536 on belong to the loader."""


def early_learning(network: Classifier, config: EarlyLearning.Config, given: Given) -> Objective:
    """ELR, or what its options add."""
    if config.ema or config.mixup:
        return EarlyLearningPlus(network, config, given)
    return Supervised(network, config, given, loss=EarlyLearning)


class EarlyLearningPlus(Objective):
    """The averaged network is evaluated and exported where there is one."""

    quantiles: Tensor
    steps: Tensor

    def __init__(self, network: Classifier, config: EarlyLearning.Config, given: Given) -> None:
        super().__init__()
        self.network, self.config = network, config
        self.slow = twin(network) if config.ema else None
        self.loss = EarlyLearning(config, given)
        if config.mixup:
            self.register_buffer("quantiles", beta_quantiles(config.mixup), persistent=False)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, batch: Batch) -> Terms:
        assert batch.label is not None
        images = batch.views[0]
        share, partner = self.draw(batch.key)
        logits = self.network(blended(images.float(), share, partner) if self.config.mixup else images)
        with (
            torch.no_grad()
        ):  # after the above: autocast keeps weights that it has cast, also without gradients
            plain = self.classifier()(images)
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            target = blended(self.loss.remembered(plain.float(), batch.index), share, partner)
            own = cross_entropy(logits, batch.label, reduction="none")
            other = cross_entropy(logits, batch.label[partner], reduction="none")
            loss = (share * own + (1 - share) * other).mean() + self.loss.held(logits, target)
            agreement = (plain.argmax(1) == batch.label).float().mean()
        return {"loss": loss, "agreement": agreement}

    def draw(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) share of each image, at least a half, and its partner's place; without MixUp 1 and its own."""
        if not self.config.mixup:
            return torch.ones(len(key), device=key.device), torch.arange(len(key), device=key.device)
        share, partner = partners(uniform(key, STREAM, 2), self.quantiles)
        return torch.maximum(share, 1 - share), partner

    def after_forward(self) -> None:
        self.loss.after_forward()

    def after_step(self, progress: float, ok: Tensor) -> None:
        self.loss.after_step(ok)
        if self.slow is not None:
            self.steps += ok
            decay = (1 - 1 / (self.steps + 1)).clamp(
                max=self.config.ema
            )  # a plain mean as long as it is short
            follow(self.slow, self.network, decay, ok)

    def classifier(self) -> nn.Module:
        """The module that is evaluated and exported."""
        return self.network if self.slow is None else self.slow
