"""Barlow Twins: two views agree in every coordinate of the embedding, and no coordinate repeats another.

Zbontar et al., ICML 2021, arXiv:2103.03230, eq. 1-2.

Needs no negatives and no momentum network; wants a wide projector, which costs memory.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from noisyssl.backbones import Backbone
from noisyssl.batch import Batch, Terms
from noisyssl.config import require
from noisyssl.distributed import sum_over_processes, world
from noisyssl.layers import mlp
from noisyssl.methods.base import SSLMethod
from noisyssl.views import asymmetric_pair


class BarlowTwins(SSLMethod):
    views = staticmethod(asymmetric_pair)
    family = "joint-embedding"
    least_batch = 2

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        width: int = 8192
        """Units of each of the three projector layers."""
        redundancy: float = 0.0051
        """Weight of the off-diagonal correlations, lambda in eq. 1."""
        bias_lr: float = 1.0
        """Learning rate of biases and norms as a share of the weights'; 0.024 with LARS (appendix A)."""

        def __post_init__(self) -> None:
            require(self.width >= 2, "pretrain.barlow.width", self.width, "at least 2")
            require(self.redundancy > 0, "pretrain.barlow.redundancy", self.redundancy, "above 0")
            require(self.bias_lr > 0, "pretrain.barlow.bias_lr", self.bias_lr, "above 0")

    def __init__(self, backbone: Backbone, config: Config, size: int) -> None:
        super().__init__(backbone, config, size)
        width = config.width
        self.projector = mlp(backbone.features, width, width, width, norm=True)
        self.redundancy, self.bias_lr = config.redundancy, config.bias_lr

    def forward(self, batch: Batch) -> Terms:
        first, second = self.embed(self.projector, batch.views)
        correlation = cross_correlation(first, second)
        diagonal = correlation.diagonal()
        invariance = (diagonal - 1).square().sum()
        redundancy = correlation.square().sum() - diagonal.square().sum()
        loss = invariance + self.redundancy * redundancy
        return {"loss": loss, "invariance": invariance, "redundancy": redundancy}

    def parameter_groups(self) -> list[dict]:
        weights, others = super().parameter_groups()
        return [weights, others | {"lr_scale": self.bias_lr}]


def cross_correlation(first: Tensor, second: Tensor, eps: float = 1e-5) -> Tensor:
    """(D, D) correlation over all processes' batches between the columns of two (B, D) embeddings.

    In float32 even under autocast: sums over a batch of products overflow fp16.
    """
    with torch.autocast(first.device.type, enabled=False):
        count = len(first) * world()
        standardised = []
        for z in (first.float(), second.float()):
            centred = z - sum_over_processes(z.sum(0)) / count
            variance = sum_over_processes(centred.square().sum(0)) / count
            standardised.append(centred / (variance + eps).sqrt())
        return sum_over_processes(standardised[0].T @ standardised[1]) / count
