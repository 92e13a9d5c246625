"""Backbones by name: normalisation plus a torchvision trunk without its classifier.

He et al., CVPR 2016, arXiv:1512.03385; small stem as in SimCLR's CIFAR setting, arXiv:2002.05709, B.9.
"""

import re
from collections.abc import Callable

from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from noisyssl.errors import ConfigError, pick
from noisyssl.layers import Normalise

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
STEMS = ("plain", "small")


class Backbone(nn.Module):
    """(B, 3, H, W) bytes to (B, features) float."""

    def __init__(self, normalise: Normalise, trunk: nn.Module, features: int) -> None:
        super().__init__()
        self.normalise = normalise
        self.trunk = trunk
        self.features = features

    def forward(self, images: Tensor) -> Tensor:
        return self.trunk(self.normalise(images))


def _narrow(width: int) -> ResNet:
    """A ResNet-18 rebuilt with `width`, 2 `width`, 4 `width` and 8 `width` channels."""
    model = resnet.resnet18()
    model.inplanes = width
    model.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
    model.bn1 = nn.BatchNorm2d(width)
    for i in range(4):
        setattr(model, f"layer{i + 1}", model._make_layer(BasicBlock, width * 2**i, 2, stride=min(i + 1, 2)))
    model.fc = nn.Linear(width * 8, 1)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


BACKBONES: dict[str, Callable[[], ResNet]] = {
    "resnet18": resnet.resnet18,
    "resnet34": resnet.resnet34,
    "resnet50": resnet.resnet50,
}
NARROW = re.compile(r"resnet18-w(\d+)")


def build_backbone(name: str, stem: str = "plain") -> Backbone:
    """The backbone called `name`, randomly initialised.

    Args:
        name: `resnet18`, `resnet34`, `resnet50`, or `resnet18-wN` whose first stage has N channels
            (a multiple of 16; 64 is plain, 32 suits a CPU and 64-pixel images).
        stem: `plain` halves the image twice before the first block; `small` (3x3 convolution, no
            pooling) keeps every pixel, for images of 64 pixels and less, at many times the cost.

    Raises:
        ConfigError: unknown name or stem.
    """
    if match := NARROW.fullmatch(name):
        width = int(match[1])
        # 8 channels crash in oneDNN's backward of the 7x7 stem at 224 pixels (torch 2.15.0, AVX-512 CPU)
        if width % 16 or not 16 <= width <= 128:
            raise ConfigError(f"backbone {name!r} has width {width}; it must be a multiple of 16 up to 128.")
        trunk = _narrow(width)
    else:
        trunk = pick({**BACKBONES, "resnet18-w32": lambda: _narrow(32)}, name, "backbone")()
    features = trunk.fc.in_features
    trunk.fc = nn.Identity()
    pick(dict.fromkeys(STEMS), stem, "stem")
    if stem == "small":
        width = trunk.conv1.out_channels
        trunk.conv1 = nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(trunk.conv1.weight, mode="fan_out", nonlinearity="relu")
        trunk.maxpool = nn.Identity()
    for module in trunk.modules():  # the last BatchNorm of a block starts at 0: blocks start as identities
        if isinstance(module, BasicBlock):
            nn.init.zeros_(module.bn2.weight)
        elif isinstance(module, Bottleneck):
            nn.init.zeros_(module.bn3.weight)
    return Backbone(Normalise(IMAGENET_MEAN, IMAGENET_STD), trunk, features)
