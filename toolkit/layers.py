"""Small layers that several models share."""

from itertools import pairwise

import torch
from torch import Tensor, nn


class Normalise(nn.Module):
    """Bytes 0-255 to zero mean and unit variance per channel; the only place this happens.

    Takes (B, 3, H, W) uint8, or float in 0-255 (MixUp); gives float32. Buffers are not called
    `mean` and `std`: the exporter's own names would collide (torch.onnx, pytorch #168211).
    """

    channel_offset: Tensor
    channel_scale: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("channel_offset", torch.tensor(mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("channel_scale", 1 / (torch.tensor(std).view(1, 3, 1, 1) * 255))

    def forward(self, images: Tensor) -> Tensor:
        return (images.float() - self.channel_offset) * self.channel_scale


def mlp(*widths: int, norm: bool = False) -> nn.Sequential:
    """Linear layers of these widths; between them ReLU, after BatchNorm if `norm`."""
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        if i:
            layers += [nn.BatchNorm1d(inputs)] if norm else []
            layers += [nn.ReLU(inplace=True)]
        layers += [nn.Linear(inputs, outputs)]
    return nn.Sequential(*layers)
