"""SimCLR: two views of one image find each other among all other views of the batch.

Chen et al., ICML 2020, arXiv:2002.05709, eq. 1 (NT-Xent).

The first choice: simple, robust against label noise afterwards, and the one we measure most. Likes batches
of 256 and more.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from noisyssl.backbones import Backbone
from noisyssl.batch import Batch, Terms
from noisyssl.distributed import gather, rank
from noisyssl.errors import ConfigError
from noisyssl.layers import mlp
from noisyssl.methods.base import SSLMethod
from noisyssl.views import pair


class SimCLR(SSLMethod):
    views = staticmethod(pair)
    family = "contrastive"
    least_batch = 2

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        temperature: float = 0.2
        """tau in eq. 1; the paper tunes 0.1-0.5, smaller batches like the middle."""
        width: int = 128
        """Units of the embedding."""

        def __post_init__(self) -> None:
            if not 0.0 < self.temperature <= 10:
                raise ConfigError(
                    f"pretrain.simclr.temperature is {self.temperature}; it must lie in (0, 10]. Try 0.2."
                )
            if self.width < 1:
                raise ConfigError(f"pretrain.simclr.width is {self.width}; it must be at least 1. Try 128.")

    def __init__(self, backbone: Backbone, config: Config, size: int) -> None:
        super().__init__(backbone, config, size)
        self.projector = mlp(backbone.features, backbone.features, config.width, norm=True)
        self.temperature = config.temperature

    def forward(self, batch: Batch) -> Terms:
        first, second = self.embed(self.projector, batch.views)
        loss, top1 = nt_xent(first, second, self.temperature)
        return {"loss": loss, "agreement": top1}


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Mean loss over the 2B views of two (B, D) embeddings, and the share whose partner is nearest.

    The views of all processes are candidates. In float32 outside autocast: exp(1 / 0.07) overflows fp16, and
    a self-similarity is masked with -inf inside a log-sum-exp, never by a large number.
    """
    with torch.autocast(first.device.type, enabled=False):
        z = F.normalize(torch.cat([first, second]).float(), dim=1)
        similarity = z @ gather(z).T / temperature
        own = torch.arange(len(z), device=z.device) + rank() * len(z)
        similarity.scatter_(1, own[:, None], -torch.inf)
        partner = own.roll(len(first))
        loss = F.cross_entropy(similarity, partner)
        return loss, (similarity.detach().argmax(1) == partner).float().mean()
