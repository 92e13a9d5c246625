"""MoCo v3: each view finds the other view's momentum embedding among those of the whole batch.

Chen, Xie & He, ICCV 2021, arXiv:2104.02057, algorithm 1.

Contrastive without a queue; the method of choice for vision transformers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from noisyssl.backbones import Backbone
from noisyssl.batch import Batch, Terms
from noisyssl.config import require
from noisyssl.distributed import gather, rank
from noisyssl.layers import mlp
from noisyssl.methods.base import SSLMethod, per_size
from noisyssl.momentum import follow, rising, twin
from noisyssl.views import asymmetric_pair


class MoCoV3(SSLMethod):
    views = staticmethod(asymmetric_pair)
    family = "contrastive"
    least_batch = 2

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        temperature: float = 0.2
        """tau; 0.2 in the paper's transformers, 1.0 in its ResNet-50."""
        width: int = 256
        """Units of the embedding."""
        hidden: int = 4096
        """Units between the layers of projector and predictor."""
        momentum: float = 0.99
        """Of the key encoder at the start; it rises to 1 along a cosine."""

        def __post_init__(self) -> None:
            require(0 < self.temperature <= 10, "pretrain.moco3.temperature", self.temperature, "in (0, 10]")
            require(self.width >= 1, "pretrain.moco3.width", self.width, "at least 1")
            require(self.hidden >= 1, "pretrain.moco3.hidden", self.hidden, "at least 1")
            require(0 <= self.momentum < 1, "pretrain.moco3.momentum", self.momentum, "in [0, 1)")

    def __init__(self, backbone: Backbone, config: Config, size: int) -> None:
        super().__init__(backbone, config, size)
        self.projector = mlp(backbone.features, config.hidden, config.width, norm=True, last_norm=True)
        self.predictor = mlp(config.width, config.hidden, config.width, norm=True, last_norm=True)
        if isinstance(patches := getattr(backbone.trunk, "conv_proj", None), nn.Module):
            patches.requires_grad_(
                False
            )  # section 4.2: a learnt patch projection makes transformers unstable
        self.key = nn.Sequential(twin(backbone), twin(self.projector))
        self.temperature, self.momentum = config.temperature, config.momentum

    def forward(self, batch: Batch) -> Terms:
        first, second = map(self.predictor, self.embed(self.projector, batch.views))
        with torch.no_grad():
            key_first, key_second = per_size(self.key, batch.views)
        loss = contrast(first, key_second, self.temperature) + contrast(second, key_first, self.temperature)
        return {"loss": loss}

    def after_step(self, progress: float, ok: Tensor) -> None:
        online = nn.Sequential(self.backbone, self.projector)
        follow(self.key, online, rising(self.momentum, progress), ok)


def contrast(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """2 tau times the mean loss of finding each (B, D) query's own key among all processes', in float32."""
    with torch.autocast(query.device.type, enabled=False):
        query, key = F.normalize(query.float(), dim=1), gather(F.normalize(key.float(), dim=1))
        own = torch.arange(len(query), device=query.device) + len(query) * rank()
        return 2 * temperature * F.cross_entropy(query @ key.T / temperature, own)
