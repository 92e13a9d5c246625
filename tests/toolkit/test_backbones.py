import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer, resnet18

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


@pytest.mark.parametrize(
    ("name", "features", "shape"),
    [("convnext_tiny", 768, (768, 32)), ("efficientnet_b0", 1280, (1280, 32)), ("vit_ti_16", 192, (192, 16)),
     ("resnet18-w16", 128, (128, 32))],
)  # fmt: skip
def test_every_family_has_features_and_a_map_of_them(name, features, shape):
    backbone = build_backbone(name).eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert backbone(images).shape == (2, features) == (2, backbone.features)
    assert backbone.map_shape(64) == shape
    side = 64 // shape[1]
    assert backbone.feature_map(backbone.normalise(images)).shape == (2, shape[0], side, side)
    assert not backbone.training


def test_a_resnets_features_are_the_mean_of_its_map():
    backbone = build_backbone("resnet18-w16").eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    found = backbone.feature_map(backbone.normalise(images)).mean((2, 3))
    torch.testing.assert_close(backbone(images), found)


def test_a_transformer_is_torchvisions_at_its_own_size_and_works_at_others():
    torch.manual_seed(0)
    theirs = VisionTransformer(
        image_size=224, patch_size=16, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=1
    ).eval()
    backbone = build_backbone("vit_ti_16").eval()
    _, missing, unused = fit_weights(backbone.trunk, theirs.state_dict())
    assert missing == []
    assert set(unused) == {"heads.head.weight", "heads.head.bias"}
    theirs.heads = nn.Identity()
    images = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(backbone.trunk(images), theirs(images), rtol=1e-4, atol=1e-5)
    assert backbone.trunk(torch.randn(2, 3, 96, 64)).shape == (2, 192)


def test_a_transformers_positions_follow_its_patches():
    """Moving what one corner shows to another changes the features; the class token stays the same row."""
    backbone = build_backbone("vit_ti_16").eval()
    images = torch.randn(1, 3, 32, 32)
    tokens, rows, columns = backbone.trunk._tokens(images)
    assert (rows, columns) == (2, 2)
    turned, _, _ = backbone.trunk._tokens(images.flip(3))
    assert not torch.allclose(tokens[:, 0], turned[:, 0], atol=1e-4)


def test_a_stem_that_a_family_lacks_is_refused():
    with pytest.raises(ConfigError, match=r"stem is 'small', which convnext_tiny does not have"):
        build_backbone("convnext_tiny", "small")
    with pytest.raises(
        ConfigError, match=r"backbone 'convnext_tyny' is unknown.*Did you mean 'convnext_tiny'"
    ):
        build_backbone("convnext_tyny")


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


def test_settled_positions_change_nothing_at_their_size():
    torch.manual_seed(0)
    backbone = build_backbone("vit_ti_16").eval()
    images = torch.randn(2, 3, 64, 64)
    before = backbone.trunk(images)
    keys = set(backbone.state_dict())
    backbone.trunk.settle(64)
    torch.testing.assert_close(backbone.trunk(images), before)
    assert set(backbone.state_dict()) == keys
