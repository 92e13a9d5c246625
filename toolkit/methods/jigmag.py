"""JigMag: tell in which order four magnifications of one place were laid out.

Koohbanani et al., IEEE TMI 2021, arXiv:2008.05571 (Self-Path), magnification puzzle.

A pretext task for microscopy. The levels are nested crops of one image: how sharp each is may give it away.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from noisyssl.backbones import Backbone
from noisyssl.batch import Batch, Terms
from noisyssl.config import require
from noisyssl.layers import mlp
from noisyssl.methods.base import SSLMethod
from noisyssl.philox import uniform
from noisyssl.views import View

LEVELS = 4
ORDER = 0
"""Stream of a sample's key."""


def square(size: int) -> tuple[View, ...]:
    """One square view; the centre crops nest inside it."""
    return (
        View(
            size=size, area=(0.5, 1.0), flip=0.5, upside=0.5, jitter=0.8,
            brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grey=0.2,
        ),
    )  # fmt: skip


class JigMag(SSLMethod):
    orders: Tensor
    views = staticmethod(square)
    family = "pretext"
    divisible = True

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        step: float = 0.7
        """Side of each level as a share of the one before; a real scanner's levels halve it."""
        hidden: int = 512
        """Units that join the four levels."""

        def __post_init__(self) -> None:
            require(0.3 <= self.step < 1, "pretrain.jigmag.step", self.step, "in [0.3, 1)")
            require(self.hidden >= 1, "pretrain.jigmag.hidden", self.hidden, "at least 1")

    def __init__(self, backbone: Backbone, config: Config, size: int) -> None:
        super().__init__(backbone, config, size)
        self.step = config.step
        self.register_buffer("orders", torch.tensor(list(itertools.permutations(range(LEVELS)))))
        self.head = mlp(LEVELS * backbone.features, config.hidden, len(self.orders))

    def forward(self, batch: Batch) -> Terms:
        count = len(batch.key)
        label = (uniform(batch.key, ORDER, 1)[:, 0] * len(self.orders)).long()
        levels = magnifications(batch.views[0], self.step, self.size // 2)
        levels = levels.gather(1, self.orders[label][:, :, None, None, None].expand_as(levels))
        features = self.backbone(levels.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        logits = self.head(features.view(count, -1))
        with torch.autocast(logits.device.type, enabled=False):
            loss = F.cross_entropy(logits.float(), label)
        return {"loss": loss, "accuracy": (logits.detach().argmax(1) == label).float().mean()}


def magnifications(images: Tensor, step: float, side: int) -> Tensor:
    """(B, 4, 3, side, side) float in 0-255: nested centre crops of (B, 3, S, S), each `step` of the last."""
    size = images.shape[-1]
    out = []
    for level in range(LEVELS):
        width = max(2, round(size * step**level))
        first = (size - width) // 2
        crop = images[..., first : first + width, first : first + width].float()
        out.append(F.interpolate(crop, (side, side), mode="bilinear", antialias=True))
    return torch.stack(out, 1)
