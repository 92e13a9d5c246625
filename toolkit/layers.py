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


def mlp(*widths: int, norm: bool = False, last_norm: bool = False) -> nn.Sequential:
    """Linear layers of these widths; between them ReLU, after BatchNorm if `norm`.

    `last_norm` ends with a BatchNorm that only centres and scales. A layer before a BatchNorm has no bias.
    """
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(widths), start=1):
        last = i == len(widths) - 1
        layers.append(nn.Linear(inputs, outputs, bias=not (last_norm if last else norm)))
        if not last:
            layers += [nn.BatchNorm1d(outputs)] if norm else []
            layers.append(nn.ReLU(inplace=True))
    if last_norm:
        layers.append(nn.BatchNorm1d(widths[-1], affine=False))
    return nn.Sequential(*layers)


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that sees a training batch in parts, as if they were on several GPUs.

    Its tensors are those of a plain BatchNorm, whose place it takes; evaluation is the same.
    """

    splits: int

    def forward(self, images: Tensor) -> Tensor:
        if not self.training or self.splits == 1:
            return super().forward(images)
        return torch.cat([super(SplitBatchNorm2d, self).forward(part) for part in images.chunk(self.splits)])

    @classmethod
    def replace(cls, network: nn.Module, splits: int) -> None:
        """Make every BatchNorm2d of `network` see its batches in `splits` parts, in place."""
        for module in network.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = cls
                assert isinstance(module, cls)
                module.splits = splits
