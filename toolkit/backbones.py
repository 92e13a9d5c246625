"""Backbones by name: normalisation plus a torchvision trunk without its classifier.

He et al., CVPR 2016, arXiv:1512.03385 (ResNet); Liu et al., CVPR 2022, arXiv:2201.03545 (ConvNeXt); Tan & Le,
ICML 2019, arXiv:1905.11946 (EfficientNet); transformers in `noisyssl.transformer`. Small stem as in SimCLR's
CIFAR setting, arXiv:2002.05709, B.9.
"""

import re

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import resnet
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from noisyssl import transformer
from noisyssl.errors import ConfigError, pick
from noisyssl.layers import Normalise
from noisyssl.transformer import Transformer

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
        self.held = False

    def hold(self, held: bool = True) -> None:
        """Stay as it is, running statistics included, whatever trains around it; or learn again."""
        self.held = held
        self.requires_grad_(not held)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Backbone":
        """As in torch; one that is held stays in evaluation mode."""
        return super().train(mode and not self.held)

    def forward(self, images: Tensor) -> Tensor:
        return self.trunk(self.normalise(images))

    def feature_map(self, normalised: Tensor) -> Tensor:
        """(B, C, h, w): the last features that still have a place, of normalised images."""
        trunk = self.trunk
        if isinstance(trunk, Transformer):
            return trunk.feature_map(normalised)
        if not isinstance(trunk, ResNet):
            return trunk.features(normalised)  # type: ignore[operator] # ConvNeXt and EfficientNet
        out = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(normalised))))
        return trunk.layer4(trunk.layer3(trunk.layer2(trunk.layer1(out))))

    @torch.no_grad()
    def map_shape(self, size: int) -> tuple[int, int]:
        """Channels of `feature_map` and how many pixels of a `size`-pixel image one place stands for."""
        training = self.training
        found = self.eval().feature_map(torch.zeros(1, 3, size, size))
        self.train(training)
        return found.shape[1], -(-size // found.shape[-1])


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


FAMILIES = ("resnet*", "resnext*", "wide_resnet*", "convnext_*", "efficientnet_*")
NARROW = re.compile(r"resnet18-w(\d+)")


def names() -> list[str]:
    """Every backbone that `build_backbone` knows, `resnet18-w32` for all widths."""
    transformers = [*transformer.BUILDERS, *transformer.SMALL]
    return sorted([*models.list_models(include=FAMILIES, module=models), *transformers, "resnet18-w32"])


def build_backbone(name: str, stem: str = "plain") -> Backbone:
    """The backbone called `name`, randomly initialised.

    Args:
        name: torchvision's name of a ResNet, ResNeXt, ConvNeXt, EfficientNet or vision transformer;
            `vit_ti_16`, `vit_s_16`; or `resnet18-wN` whose first stage has N channels (a multiple of
            16; 64 is plain, 32 suits a CPU and 64-pixel images).
        stem: `plain`; `small` (ResNets only: 3x3 convolution, no pooling) keeps every pixel, for images of
            64 pixels and less, at many times the cost.

    Raises:
        ConfigError: unknown name or stem.
    """
    pick(dict.fromkeys(STEMS), stem, "stem")
    trunk, features = _trunk(name)
    if stem == "small":
        if not isinstance(trunk, ResNet):
            raise ConfigError(f"stem is 'small', which {name} does not have; set stem=plain or a ResNet.")
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


def _trunk(name: str) -> tuple[nn.Module, int]:
    """A network without its last linear layer, and the number of its features."""
    trunk: nn.Module
    if match := NARROW.fullmatch(name):
        width = int(match[1])
        # 8 channels crash in oneDNN's backward of the 7x7 stem at 224 pixels (torch 2.15.0, AVX-512 CPU)
        if width % 16 or not 16 <= width <= 128:
            raise ConfigError(f"backbone {name!r} has width {width}; it must be a multiple of 16 up to 128.")
        trunk = _narrow(width)
    elif name in transformer.BUILDERS or name in transformer.SMALL:
        trunk = transformer.build_transformer(name)
    else:
        trunk = models.get_model(pick({known: known for known in names()}, name, "backbone"))
    last = "fc" if isinstance(trunk, ResNet) else "heads" if isinstance(trunk, Transformer) else "classifier"
    head = getattr(trunk, last)
    linear = [module for module in head.modules() if isinstance(module, nn.Linear)][-1]
    if isinstance(trunk, models.ConvNeXt):
        head[-1] = nn.Identity()  # its norm and flattening come before
    else:
        setattr(trunk, last, nn.Identity())
    return trunk, linear.in_features
