"""MoCo v2+: find the other view's momentum embedding among a queue of earlier images.

Chen, Fan, Girshick & He 2020, arXiv:2003.04297; He et al., CVPR 2020, arXiv:1911.05722, algorithm 1; both
views are queries and keys ("+"), as in the authors' symmetric variant.

Contrastive with small batches: the queue holds the negatives. Keep the queue below a few epochs of images.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from noisyssl.backbones import Backbone
from noisyssl.batch import Batch, Terms
from noisyssl.config import require
from noisyssl.distributed import gather, world
from noisyssl.errors import ConfigError
from noisyssl.layers import SplitBatchNorm2d, mlp
from noisyssl.methods.base import SSLMethod
from noisyssl.momentum import follow, twin
from noisyssl.philox import uniform
from noisyssl.views import pair

QUERIES, KEYS = 0, 1
"""Streams of a sample's key: which images share a BatchNorm as queries, and which as keys."""


class MoCoV2(SSLMethod):
    queue: Tensor
    pointer: Tensor
    views = staticmethod(pair)
    family = "contrastive"
    sync_batchnorm = False
    least_batch = 2

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        temperature: float = 0.2
        """tau."""
        width: int = 128
        """Units of the embedding."""
        queue: int = 65_536
        """Earlier embeddings that serve as negatives: a multiple of twice the batch."""
        momentum: float = 0.999
        """Of the key encoder, the same throughout."""
        splits: int = 8
        """BatchNorms see the batch in so many parts, as the paper's did on 8 GPUs; 1 for the whole batch.

        Several processes have their part of these parts, but two each at least.
        """

        def __post_init__(self) -> None:
            require(0 < self.temperature <= 10, "pretrain.moco2.temperature", self.temperature, "in (0, 10]")
            require(self.width >= 1, "pretrain.moco2.width", self.width, "at least 1")
            require(self.queue >= 2, "pretrain.moco2.queue", self.queue, "at least 2")
            require(0 <= self.momentum < 1, "pretrain.moco2.momentum", self.momentum, "in [0, 1)")
            require(self.splits >= 1, "pretrain.moco2.splits", self.splits, "at least 1")

    def __init__(self, backbone: Backbone, config: Config, size: int) -> None:
        super().__init__(backbone, config, size)
        self.temperature, self.momentum = config.temperature, config.momentum
        self.splits = parts_of_a_share(config.splits, world())
        SplitBatchNorm2d.replace(backbone, self.splits)
        self.projector = mlp(backbone.features, backbone.features, config.width)
        self.key = nn.Sequential(twin(backbone), twin(self.projector))
        self.register_buffer("queue", F.normalize(torch.randn(config.queue, config.width), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.left: Tensor | None = None
        self.waiting: list[Tensor] = []
        """Keys since the last step, of one forward pass each; they join the queue after it."""

    def must_accept(self, batch: int) -> None:
        super().must_accept(batch)
        parts = self.splits * world()
        if batch < 2 * parts:
            raise ConfigError(
                f"pretrain.batch is {batch}, but BatchNorm sees it in {parts} parts of at least 2; "
                f"set pretrain.batch at least {2 * parts}, or pretrain.moco2.splits lower."
            )
        if len(self.queue) < 2 * batch or len(self.queue) % (2 * batch):
            raise ConfigError(
                f"pretrain.moco2.queue is {len(self.queue)}; it must be a multiple of twice the batch, "
                f"{2 * batch}. Set pretrain.moco2.queue={-(-len(self.queue) // (2 * batch)) * 2 * batch}."
            )

    def forward(self, batch: Batch) -> Terms:
        queries = self._encode(nn.Sequential(self.backbone, self.projector), batch, QUERIES)
        with torch.no_grad():
            keys = self._encode(self.key, batch, KEYS)
        first, second = (
            contrast(q, k, self.queue, self.temperature) for q, k in zip(queries, keys[::-1], strict=True)
        )
        self.left = torch.cat([gather(k) for k in keys])
        return {"loss": (first[0] + second[0]) / 2, "agreement": (first[1] + second[1]) / 2}

    def after_forward(self) -> None:
        if self.left is not None:
            self.waiting.append(self.left)
        self.left = None

    def after_step(self, progress: float, ok: Tensor) -> None:
        self.after_forward()
        follow(self.key, nn.Sequential(self.backbone, self.projector), self.momentum, ok)
        keys, self.waiting = torch.cat([self.queue[:0], *self.waiting]), []  # copies: see `State.begin`
        where = (self.pointer + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[where] = torch.where(ok, keys, self.queue[where])
        self.pointer += len(keys) * ok

    def _encode(self, network: nn.Module, batch: Batch, stream: int) -> tuple[Tensor, ...]:
        """Unit embeddings per view, (B, D) float32; images meet in BatchNorms by chance.

        Queries and keys meet different ones, else the statistics would give the positive away (section 3.3
        of the first paper). Chance is a function of the samples' own keys.
        """
        order = uniform(batch.key, stream, 1)[:, 0].argsort()
        back = order.argsort()
        out = (network(view[order]) for view in batch.views)
        return tuple(F.normalize(z.float(), dim=1)[back] for z in out)


def parts_of_a_share(splits: int, processes: int) -> int:
    """In how many parts BatchNorms see the share of one of several processes.

    With one part, queries and keys would meet the same images, which gives the positive away.
    """
    return splits if processes == 1 or splits == 1 else max(2, splits // processes)


def contrast(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Mean loss of finding each (B, D) unit query's key before a (Q, D) queue, and the share found.

    In float32.
    """
    with torch.autocast(query.device.type, enabled=False):
        query = query.float()
        positive = (query * key.float()).sum(1, keepdim=True)
        logits = torch.cat([positive, query @ queue.T], dim=1) / temperature
        loss = F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64, device=query.device))
        return loss, (logits.detach().argmax(1) == 0).float().mean()
