"""BYOL: predict what a slowly following copy of the network says of the other view.

Grill et al., NeurIPS 2020, arXiv:2006.07733, eq. 2.

No negatives, so small batches hurt little; twice the forward passes. Watch for collapse.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from noisyssl.backbones import Backbone
from noisyssl.batch import Batch, Terms
from noisyssl.config import require
from noisyssl.layers import mlp
from noisyssl.methods.base import SSLMethod, per_size
from noisyssl.momentum import follow, rising, twin
from noisyssl.views import asymmetric_pair


class BYOL(SSLMethod):
    views = staticmethod(asymmetric_pair)
    family = "joint-embedding"
    least_batch = 2

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        width: int = 256
        """Units of the embedding."""
        hidden: int = 4096
        """Units between the layers of projector and predictor."""
        momentum: float = 0.99
        """Of the target network at the start; it rises to 1 along a cosine."""

        def __post_init__(self) -> None:
            require(self.width >= 1, "pretrain.byol.width", self.width, "at least 1")
            require(self.hidden >= 1, "pretrain.byol.hidden", self.hidden, "at least 1")
            require(0 <= self.momentum < 1, "pretrain.byol.momentum", self.momentum, "in [0, 1)")

    def __init__(self, backbone: Backbone, config: Config, size: int) -> None:
        super().__init__(backbone, config, size)
        self.projector = mlp(backbone.features, config.hidden, config.width, norm=True)
        self.predictor = mlp(config.width, config.hidden, config.width, norm=True)
        self.target = nn.Sequential(twin(backbone), twin(self.projector))
        self.momentum = config.momentum

    def forward(self, batch: Batch) -> Terms:
        first, second = map(self.predictor, self.embed(self.projector, batch.views))
        with torch.no_grad():
            goal_first, goal_second = per_size(self.target, batch.views)
        loss = distance(first, goal_second) + distance(second, goal_first)
        return {"loss": loss}

    def after_step(self, progress: float, ok: Tensor) -> None:
        online = nn.Sequential(self.backbone, self.projector)
        follow(self.target, online, rising(self.momentum, progress), ok)


def distance(prediction: Tensor, goal: Tensor) -> Tensor:
    """Mean squared distance of the unit vectors of two (B, D) tensors, 2 - 2 cos; in float32."""
    with torch.autocast(prediction.device.type, enabled=False):
        return 2 - 2 * F.cosine_similarity(prediction.float(), goal.float(), eps=1e-6).mean()
