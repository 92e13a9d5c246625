"""VICReg: two views agree, while every coordinate keeps its spread and none repeats another.

Bardes, Ponce & LeCun, ICLR 2022, arXiv:2105.04906, eq. 1-6.

Like Barlow Twins without standardising the embeddings; three weights instead of one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from noisyssl.backbones import Backbone
from noisyssl.batch import Batch, Terms
from noisyssl.config import require
from noisyssl.distributed import sum_over_processes, world
from noisyssl.layers import mlp
from noisyssl.methods.base import SSLMethod
from noisyssl.views import asymmetric_pair


class VICReg(SSLMethod):
    views = staticmethod(asymmetric_pair)
    family = "joint-embedding"
    least_batch = 2

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        width: int = 8192
        """Units of each of the three projector layers."""
        invariance: float = 25.0
        """Weight of the squared distance of the views, lambda in eq. 6."""
        variance: float = 25.0
        """Weight of the hinge on the standard deviations, mu in eq. 6."""
        covariance: float = 1.0
        """Weight of the off-diagonal covariances, nu in eq. 6."""

        def __post_init__(self) -> None:
            require(self.width >= 2, "pretrain.vicreg.width", self.width, "at least 2")
            for name in ("invariance", "variance", "covariance"):
                require(
                    getattr(self, name) >= 0, f"pretrain.vicreg.{name}", getattr(self, name), "0 or above"
                )

    def __init__(self, backbone: Backbone, config: Config, size: int) -> None:
        super().__init__(backbone, config, size)
        width = config.width
        self.projector = mlp(backbone.features, width, width, width, norm=True)
        self.weights = config.invariance, config.variance, config.covariance

    def forward(self, batch: Batch) -> Terms:
        first, second = self.embed(self.projector, batch.views)
        with torch.autocast(first.device.type, enabled=False):
            first, second = first.float(), second.float()
            invariance = F.mse_loss(first, second)
            (variance, covariance), (more, also) = map(variance_and_covariance, (first, second))
            variance, covariance = (variance + more) / 2, covariance + also  # as in the authors' code
            of_invariance, of_variance, of_covariance = self.weights
            loss = of_invariance * invariance + of_variance * variance + of_covariance * covariance
        return {"loss": loss, "invariance": invariance, "variance": variance, "covariance": covariance}


def variance_and_covariance(z: Tensor, eps: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Eq. 1 and eq. 4 of (B, D) float32 embeddings, over the batches of all processes."""
    count, width = len(z) * world(), z.shape[1]
    centred = z - sum_over_processes(z.sum(0)) / count
    covariance = sum_over_processes(centred.T @ centred) / (count - 1)
    diagonal = covariance.diagonal()
    spread = F.relu(1 - (diagonal + eps).sqrt()).mean()
    return spread, (covariance.square().sum() - diagonal.square().sum()) / width
