import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from noisyssl.backbones import IMAGENET_MEAN, IMAGENET_STD, build_backbone
from noisyssl.checkpoint import fit_weights
from noisyssl.classifier import build_classifier
from noisyssl.errors import ConfigError
from noisyssl.layers import Normalise, mlp


@pytest.mark.parametrize(
    ("name", "features"), [("resnet18", 512), ("resnet34", 512), ("resnet50", 2048), ("resnet18-w32", 256)]
)
@pytest.mark.parametrize("stem", ["plain", "small"])
def test_backbones_give_one_row_of_features_per_image(name, features, stem):
    backbone = build_backbone(name, stem).eval()
    assert backbone.features == features
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert backbone(images).shape == (2, features)


def test_the_full_width_is_torchvisions_own_model():
    """Same names, same computation: ImageNet weights fit."""
    theirs = resnet18().eval()
    for name in ("resnet18", "resnet18-w64"):
        backbone = build_backbone(name).eval()
        _, missing, unused = fit_weights(backbone.trunk, theirs.state_dict())
        assert missing == []
        assert set(unused) == {"fc.weight", "fc.bias"}
        images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
        scaled = (images / 255 - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(
            3, 1, 1
        )
        theirs.fc = nn.Identity()
        torch.testing.assert_close(backbone(images), theirs(scaled), rtol=1e-4, atol=1e-4)
        theirs = resnet18().eval()


def test_every_convolution_sees_channels_last():
    """AMP's speed hangs on it: one contiguous tensor in the chain and all behind it are copied."""
    model = build_classifier("resnet18-w16", "plain", 3).to(memory_format=torch.channels_last)
    seen = []

    def note(module, inputs, output):
        seen.append(output.is_contiguous(memory_format=torch.channels_last))

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    bytes_ = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    model(bytes_).sum().backward()
    assert len(seen) == 20
    assert all(seen)


def test_normalise_takes_bytes_and_floats_alike():
    normalise = Normalise((0.5, 0.25, 0.0), (0.5, 0.25, 1.0))
    images = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    expected = torch.tensor([[-1.0, 1.0], [-1.0, 3.0], [0.0, 1.0]]).view(1, 3, 1, 2)
    torch.testing.assert_close(normalise(images), expected)
    torch.testing.assert_close(normalise(images.float()), expected)


def test_mlp_has_its_layers_between():
    kinds = [type(layer).__name__ for layer in mlp(4, 8, 8, 2, norm=True)]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]


@pytest.mark.parametrize(
    ("name", "stem", "message"),
    [
        ("resnet19", "plain", r"backbone 'resnet19' is unknown.*Did you mean"),
        ("resnet18-w1000", "plain", "width 1000; it must be a multiple of 16"),
        ("resnet18", "tiny", "stem 'tiny' is unknown"),
    ],
)
def test_unknown_names_are_refused(name, stem, message):
    with pytest.raises(ConfigError, match=message):
        build_backbone(name, stem)
