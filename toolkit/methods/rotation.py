"""Rotation: tell by which quarter turn an image was rotated.

Gidaris et al., ICLR 2018, arXiv:1803.07728, eq. 2-3.

A pretext task for images that have an "up": chest films do, tissue does not.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from noisyssl.backbones import Backbone
from noisyssl.batch import Batch, Terms
from noisyssl.methods.base import SSLMethod
from noisyssl.philox import uniform
from noisyssl.views import View

TURN, CROP = 0, 1
"""Streams of a sample's key."""


def large_square(size: int) -> tuple[View, ...]:
    """One square view an eighth larger than `size`: it is rotated first and cropped afterwards.

    No flip: a flipped image has no "up" of its own that a turn would be measured from.
    """
    return (View(size=size + size // 8, area=(0.5, 1.0), jitter=0.8, brightness=0.4, contrast=0.4),)


class Rotation(SSLMethod):
    views = staticmethod(large_square)
    family = "pretext"
    divisible = True
    upright = True

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        pass

    def __init__(self, backbone: Backbone, config: Config, size: int) -> None:
        super().__init__(backbone, config, size)
        self.head = nn.Linear(backbone.features, 4)

    def forward(self, batch: Batch) -> Terms:
        turns = (uniform(batch.key, TURN, 1)[:, 0] * 4).long()
        images = crop(rotate(batch.views[0], turns), self.size, uniform(batch.key, CROP, 2))
        logits = self.head(self.backbone(images))
        with torch.autocast(logits.device.type, enabled=False):
            loss = F.cross_entropy(logits.float(), turns)
        return {"loss": loss, "accuracy": (logits.detach().argmax(1) == turns).float().mean()}


def rotate(images: Tensor, turns: Tensor) -> Tensor:
    """Each square image of (B, C, S, S) turned counter-clockwise by turns[i] quarter turns."""
    turned = images
    for k in (1, 2, 3):  # three selections instead of four index lists: no wait for the GPU
        turned = torch.where((turns == k)[:, None, None, None], images.rot90(k, (2, 3)), turned)
    return turned


def crop(images: Tensor, size: int, where: Tensor) -> Tensor:
    """(B, C, size, size) windows of (B, C, S, S) images; `where` (B, 2) in [0, 1) places each one."""
    corner = (where * (images.shape[-1] - size + 1)).long()
    along = torch.arange(size, device=images.device)
    rows = (corner[:, :1] + along)[:, :, None]
    columns = (corner[:, 1:] + along)[:, None, :]
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    # indexing channels-last images gives (B, size, size, C): the permutation back is free
    return images.permute(0, 2, 3, 1)[sample, rows, columns].permute(0, 3, 1, 2)
