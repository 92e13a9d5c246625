"""Small layers that several models share."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from noisyssl.distributed import gather, world


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
        count = min(self.splits, len(images) // 2)  # dropped files leave fewer images: no part of one
        if not self.training or count < 2:
            return super().forward(images)
        parts = images.tensor_split(count)
        return torch.cat([super(SplitBatchNorm2d, self).forward(part) for part in parts])

    @classmethod
    def replace(cls, network: nn.Module, splits: int) -> None:
        """Make every BatchNorm2d of `network` see its batches in `splits` parts, in place."""
        for module in network.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = cls
                assert isinstance(module, cls)
                module.splits = splits


class JoinedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the batches of all processes: what `nn.SyncBatchNorm` is on a GPU, on a CPU too."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # 1-d and 2-d alike

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, ...) as they came, normalised by the joined batch's statistics; B is equal everywhere."""
        if not self.training or world() == 1:
            return super().forward(images)
        dims = [0, *range(2, images.ndim)]
        wide = images.to(torch.promote_types(images.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, dims, correction=0)
        means, variances = gather(torch.stack([mean, variance])[None]).unbind(1)
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
        count = world() * images.numel() // images.shape[1]
        with torch.no_grad():
            assert self.momentum is not None  # no backbone counts batches instead
            for running, now in (
                (self.running_mean, mean),
                (self.running_var, variance * (count / (count - 1))),
            ):
                assert running is not None
                running.lerp_(now, self.momentum)
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
        scale = (variance + self.eps).rsqrt()
        scale = scale * self.weight if self.affine else scale
        shift = self.bias - mean * scale if self.affine else -mean * scale
        shape = (1, -1, *[1] * (images.ndim - 2))
        return torch.addcmul(shift.view(shape), images, scale.view(shape)).to(images.dtype)


def join_batchnorms(network: nn.Module, device: torch.device) -> None:
    """Let every plain BatchNorm of `network` see all processes' batches; in place, tensors keep names."""
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return
    for module in network.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
            module.__class__ = JoinedBatchNorm
