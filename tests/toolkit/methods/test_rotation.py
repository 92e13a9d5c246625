import math

import pytest
import torch

from noisyssl.backbones import build_backbone
from noisyssl.batch import Batch
from noisyssl.methods.rotation import CROP, TURN, Rotation, crop, large_square, rotate
from noisyssl.philox import uniform
from noisyssl.views import View

SIZE = 32


def build(seed=0):
    torch.manual_seed(seed)
    return Rotation(build_backbone("resnet18-w16"), Rotation.Config(), SIZE)


def batch_for(count):
    generator = torch.Generator().manual_seed(0)
    (view,) = large_square(SIZE)
    shape = (count, 3, view.size, view.size)
    key = torch.randint(-(2**62), 2**62, (count,), generator=generator)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return Batch(views=(images,), index=torch.arange(count), key=key)


def test_rotate_is_rot90_of_each_image():
    images = torch.randint(0, 256, (8, 3, 6, 6), dtype=torch.uint8)
    turns = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])
    turned = rotate(images, turns)
    for i, k in enumerate(turns.tolist()):
        assert torch.equal(turned[i], images[i].rot90(k, (1, 2)))


def test_rotation_turns_before_it_crops():
    """The crop of a turned image, never the turn of a crop: else the window's place would tell the turn."""
    images = torch.arange(2 * 3 * 100).view(2, 3, 10, 10)
    where = torch.tensor([[0.0, 0.99], [0.5, 0.0]])
    window = crop(rotate(images, torch.tensor([1, 2])), 8, where)
    assert torch.equal(window[0], images[0].rot90(1, (1, 2))[:, 0:8, 2:10])
    assert torch.equal(window[1], images[1].rot90(2, (1, 2))[:, 1:9, 0:8])
    assert window.shape == (2, 3, 8, 8)


def test_rotation_learns_from_what_was_turned_and_then_cropped(monkeypatch):
    method, batch = build(), batch_for(8)
    seen = []
    monkeypatch.setattr(
        method.backbone,
        "forward",
        lambda images: (seen.append(images), torch.zeros(8, method.backbone.features))[1],
    )
    method(batch)
    turns = (uniform(batch.key, TURN, 1)[:, 0] * 4).long()
    where = uniform(batch.key, CROP, 2)
    assert len(turns.unique()) > 1
    for i in range(8):
        corner = (where[i] * (SIZE // 8 + 1)).long()
        turned = batch.views[0][i].rot90(int(turns[i]), (1, 2))
        assert torch.equal(seen[0][i], turned[:, corner[0] : corner[0] + SIZE, corner[1] : corner[1] + SIZE])


def test_rotation_labels_are_uniform_and_its_view_has_an_up():
    turns = (uniform(torch.arange(40_000), 0, 1)[:, 0] * 4).long()
    counts = torch.bincount(turns, minlength=4)
    assert counts.sub(10_000).abs().max() < 4 * math.sqrt(10_000 * 0.75)
    (view,) = large_square(64)
    assert isinstance(view, View)
    assert (view.flip, view.upside) == (0.0, 0.0)
    assert view.size > 64


def test_rotation_of_unrelated_images_starts_at_chance():
    losses = [build(seed)(batch_for(64))["loss"].item() for seed in range(3)]
    assert sum(losses) / 3 == pytest.approx(math.log(4), abs=0.4)
