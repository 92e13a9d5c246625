"""Jigsaw: tell in which order the nine tiles of an image were laid out.

Noroozi & Favaro, ECCV 2016, arXiv:1603.09246, algorithm 1.

A pretext task that needs parts with places: organs, not tissue. Nine small tiles cost less than one image.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from noisyssl.backbones import Backbone
from noisyssl.batch import Batch, Terms
from noisyssl.config import require
from noisyssl.errors import ConfigError
from noisyssl.layers import mlp
from noisyssl.methods.base import SSLMethod
from noisyssl.philox import uniform
from noisyssl.views import View

GRID = 3
SMALLEST = 8
"""Pixels of the smallest tile that still shows something."""
ORDER, PLACE, GREY = 0, 1, 2
"""Streams of a sample's key."""


def sides(size: int) -> tuple[int, int]:
    """Pixels of a cell and of the tile cut from it: 85 and 64 of a 255-pixel square, in proportion to 224.

    The gap of up to a quarter of a cell keeps edges from continuing in the next tile.
    """
    cell = round(size * 85 / 224)
    return cell, round(cell * 64 / 85)


def square(size: int) -> tuple[View, ...]:
    """One large square view; grey and colour come per tile."""
    cell, tile = sides(size)
    if tile < SMALLEST:
        raise ConfigError(
            f"data.size is {size}; Jigsaw's tiles would have {tile} pixels, at least {SMALLEST} are needed. "
            "Set data.size=32 or above."
        )
    return (View(size=GRID * cell, area=(0.5, 1.0), jitter=0.8, brightness=0.4, contrast=0.4),)


class Jigsaw(SSLMethod):
    permutations: Tensor
    views = staticmethod(square)
    family = "pretext"
    divisible = True

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        permutations: int = 100
        """Orders to tell apart, 100 of them differing in at least 6 of 9 places; the paper goes to 1,000."""
        hidden: int = 1024
        """Units of each tile's layer, and of the one that joins them."""
        grey: float = 0.3
        """Share of images whose tiles are grey: without colour, its fringes give no place away."""

        def __post_init__(self) -> None:
            require(
                2 <= self.permutations <= 10_000, "pretrain.jigsaw.permutations", self.permutations, "2-10000"
            )
            require(self.hidden >= 1, "pretrain.jigsaw.hidden", self.hidden, "at least 1")
            require(0 <= self.grey <= 1, "pretrain.jigsaw.grey", self.grey, "in [0, 1]")

    def __init__(self, backbone: Backbone, config: Config, size: int) -> None:
        super().__init__(backbone, config, size)
        self.cell, self.tile = sides(size)
        self.grey = config.grey
        orders = torch.from_numpy(distant_permutations(config.permutations))
        self.register_buffer("permutations", orders)
        self.each = mlp(backbone.features, config.hidden)
        self.all = mlp(GRID**2 * config.hidden, config.hidden, config.permutations)

    def forward(self, batch: Batch) -> Terms:
        count = len(batch.key)
        label = (uniform(batch.key, ORDER, 1)[:, 0] * len(self.permutations)).long()
        places = uniform(batch.key, PLACE, 2 * GRID**2).view(count, GRID**2, 2)
        tiles = cut(batch.views[0], self.cell, self.tile, places)
        grey = uniform(batch.key, GREY, 1)[:, 0] < self.grey
        tiles = torch.where(grey[:, None, None, None, None], luma(tiles), tiles)
        tiles = standardised(tiles).gather(
            1, self.permutations[label][:, :, None, None, None].expand_as(tiles)
        )
        # the trunk itself: its input is normalised tile by tile, or brightness would tell neighbours
        features = self.backbone.trunk(tiles.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        logits = self.all(F.relu(self.each(features)).view(count, -1))
        with torch.autocast(logits.device.type, enabled=False):
            loss = F.cross_entropy(logits.float(), label)
        return {"loss": loss, "accuracy": (logits.detach().argmax(1) == label).float().mean()}


def cut(images: Tensor, cell: int, tile: int, places: Tensor) -> Tensor:
    """(B, 9, 3, T, T) float tiles of (B, 3, 3 cell, 3 cell) images, row by row.

    `places` (B, 9, 2) in [0, 1) says where in its cell each tile lies.
    """
    count = len(images)
    corners = (places * (cell - tile + 1)).long()
    number = torch.arange(GRID**2, device=images.device)
    first = torch.stack([number // GRID, number % GRID], 1) * cell + corners
    along = torch.arange(tile, device=images.device)
    rows = (first[..., :1] + along)[..., :, None]
    columns = (first[..., 1:] + along)[..., None, :]
    sample = torch.arange(count, device=images.device)[:, None, None, None]
    return images.permute(0, 2, 3, 1)[sample, rows, columns].permute(0, 1, 4, 2, 3).float()


def luma(tiles: Tensor) -> Tensor:
    """Grey tiles of (B, 9, 3, T, T), still with three channels."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=tiles.device).view(3, 1, 1)
    return (tiles * weights).sum(2, keepdim=True).expand_as(tiles)


def standardised(tiles: Tensor, eps: float = 1.0) -> Tensor:
    """Each tile and channel with zero mean and unit deviation; a flat one stays flat (eps in grey levels)."""
    deviation, mean = torch.std_mean(tiles, (-2, -1), keepdim=True, correction=0)
    return (tiles - mean) / (deviation + eps)


@cache
def distant_permutations(count: int, seed: int = 0) -> np.ndarray:
    """(count, 9) int64 orders of nine tiles, each as far from all chosen before as possible.

    Algorithm 1 with the maximal minimal Hamming distance, ties by the lowest row; the first is random.
    """
    everything = np.zeros((1, 0), np.int8)
    for tile in range(GRID**2):  # the new tile in every gap of every order so far
        everything = np.concatenate([np.insert(everything, gap, tile, axis=1) for gap in range(tile + 1)])
    nearest = np.full(len(everything), GRID**2 + 1, np.int8)
    chosen = [int(np.random.default_rng(seed).integers(len(everything)))]
    while True:
        distance = (everything != everything[chosen[-1]]).sum(1, dtype=np.int8)
        np.minimum(nearest, distance, out=nearest)
        if len(chosen) == count:
            return everything[chosen].astype(np.int64)
        chosen.append(int(nearest.argmax()))
