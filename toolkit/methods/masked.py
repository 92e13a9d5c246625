"""Masked reconstruction: paint the hidden patches of an image from what is left of it.

Xie et al., CVPR 2022, arXiv:2111.09886 (SimMIM), section 3: masked patches, one linear layer, L1 on them.

The generative family, for convolutional backbones and transformers alike; needs long training.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from noisyssl.backbones import Backbone
from noisyssl.batch import Batch, Terms
from noisyssl.config import require
from noisyssl.errors import ConfigError
from noisyssl.methods.base import SSLMethod
from noisyssl.philox import uniform
from noisyssl.views import View

MASK = 0
"""Stream of a sample's key."""


def crop_and_flip(size: int) -> tuple[View, ...]:
    """What the paper uses: a crop and a flip, no colour."""
    return (View(size=size, area=(0.67, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5),)


class Masked(SSLMethod):
    views = staticmethod(crop_and_flip)
    family = "generative"
    divisible = True

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        ratio: float = 0.6
        """Share of the patches that are hidden."""
        patch: int = 0
        """Side of a patch in pixels; 0 is the divisor of the image's side next to a seventh (32 of 224)."""

        def __post_init__(self) -> None:
            require(0 < self.ratio < 1, "pretrain.masked.ratio", self.ratio, "in (0, 1)")
            require(self.patch >= 0, "pretrain.masked.patch", self.patch, "0 (automatic) or above")

    def __init__(self, backbone: Backbone, config: Config, size: int) -> None:
        super().__init__(backbone, config, size)
        divisors = [side for side in range(2, size // 2 + 1) if size % side == 0]
        self.patch = config.patch or min(divisors, key=lambda side: abs(side - size / 7), default=0)
        if self.patch not in divisors:
            raise ConfigError(
                f"pretrain.masked.patch is {self.patch}; it must divide data.size {size} into at least 2: "
                f"{', '.join(map(str, divisors)) or 'another data.size'}."
            )
        self.ratio = config.ratio
        channels, stride = backbone.map_shape(size)
        self.token = nn.Parameter(torch.zeros(3, 1, 1))
        self.decoder = nn.Conv2d(channels, 3 * stride**2, kernel_size=1)
        self.stride = stride

    def forward(self, batch: Batch) -> Terms:
        images = self.backbone.normalise(batch.views[0])
        hidden = mask(batch.key, self.size // self.patch, self.ratio)
        hidden = hidden.repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3)
        seen = torch.where(hidden, self.token, images).contiguous(memory_format=torch.channels_last)
        painted = F.pixel_shuffle(self.decoder(self.backbone.feature_map(seen)), self.stride)
        with torch.autocast(images.device.type, enabled=False):
            # a map may reach beyond the image by less than its stride
            error = (painted[..., : self.size, : self.size].float() - images).abs() * hidden
            loss = error.sum() / (3 * hidden.sum())
        return {"loss": loss}


def mask(key: Tensor, side: int, ratio: float) -> Tensor:
    """(B, 1, side, side) bool: `ratio` of each image's patches, at least one and never all."""
    draws = uniform(key, MASK, side * side)
    count = min(max(1, round(ratio * side * side)), side * side - 1)
    return (draws.argsort(1).argsort(1) < count).view(-1, 1, side, side)
