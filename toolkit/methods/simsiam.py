"""SimSiam: predict the other view's embedding, through which no gradient flows; no momentum, no negatives.

Chen & He, CVPR 2021, arXiv:2011.10566, eq. 1-4.

The least machinery of all joint-embedding methods, and the first to collapse on small data.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from noisyssl.backbones import Backbone
from noisyssl.batch import Batch, Terms
from noisyssl.config import require
from noisyssl.layers import mlp
from noisyssl.methods.base import SSLMethod
from noisyssl.views import pair


class SimSiam(SSLMethod):
    views = staticmethod(pair)
    family = "joint-embedding"
    least_batch = 2

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        width: int = 2048
        """Units of the three projector layers."""
        bottleneck: int = 512
        """Units inside the predictor."""

        def __post_init__(self) -> None:
            require(self.width >= 1, "pretrain.simsiam.width", self.width, "at least 1")
            require(self.bottleneck >= 1, "pretrain.simsiam.bottleneck", self.bottleneck, "at least 1")

    def __init__(self, backbone: Backbone, config: Config, size: int) -> None:
        super().__init__(backbone, config, size)
        width = config.width
        self.projector = mlp(backbone.features, width, width, width, norm=True, last_norm=True)
        self.predictor = mlp(width, config.bottleneck, width, norm=True)

    def forward(self, batch: Batch) -> Terms:
        first, second = self.embed(self.projector, batch.views)
        loss = (agreement(self.predictor(first), second) + agreement(self.predictor(second), first)) / 2
        return {"loss": loss}

    def parameter_groups(self) -> list[dict]:
        """The predictor keeps its learning rate, so that it follows the latest embeddings (section 4.2)."""
        mine = {id(p) for p in self.predictor.parameters()}
        groups = []
        for group in super().parameter_groups():
            groups.append(group | {"params": [p for p in group["params"] if id(p) not in mine]})
            groups.append(group | {"params": [p for p in group["params"] if id(p) in mine], "constant": True})
        return groups


def agreement(prediction: Tensor, goal: Tensor) -> Tensor:
    """Negative mean cosine of two (B, D) tensors (eq. 1), in float32; no gradient reaches `goal` (eq. 3)."""
    with torch.autocast(prediction.device.type, enabled=False):
        return -F.cosine_similarity(prediction.float(), goal.detach().float(), eps=1e-6).mean()
