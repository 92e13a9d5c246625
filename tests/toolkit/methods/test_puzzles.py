"""Laws of the pretext tasks that cut an image up: Jigsaw, JigMag and masked reconstruction."""

import math

import numpy as np
import pytest
import torch

from noisyssl.backbones import build_backbone
from noisyssl.batch import Batch
from noisyssl.errors import ConfigError
from noisyssl.methods.jigmag import JigMag, magnifications
from noisyssl.methods.jigsaw import Jigsaw, cut, distant_permutations, luma, sides, square, standardised
from noisyssl.methods.masked import Masked, mask
from noisyssl.philox import uniform


def test_permutations_are_unique_permutations_far_apart():
    orders = distant_permutations(100)
    assert {tuple(sorted(row)) for row in orders.tolist()} == {tuple(range(9))}
    apart = (orders[:, None] != orders[None]).sum(2)
    assert apart[np.triu_indices(100, 1)].min() == 6
    assert (distant_permutations(9)[:, None] != distant_permutations(9)[None]).sum(2).min(
        initial=9, where=~np.eye(9, dtype=bool)
    ) == 9, "nine orders can differ in every place"


def test_more_permutations_begin_with_the_same_ones():
    assert np.array_equal(distant_permutations(20)[:5], distant_permutations(5))


def test_tiles_come_from_their_cells_with_a_gap():
    cell, tile = sides(224)
    assert (cell, tile) == (85, 64)
    images = torch.arange(255 * 255).view(1, 1, 255, 255).expand(2, 3, -1, -1)
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(2, 9, 2, generator=generator)
    tiles = cut(images, cell, tile, places)
    assert tiles.shape == (2, 9, 3, 64, 64)
    for sample in range(2):
        for number in range(9):
            row, column = (places[sample, number] * 22).long().tolist()
            top, left = number // 3 * 85 + row, number % 3 * 85 + column
            assert torch.equal(
                tiles[sample, number, 0], images[sample, 0, top : top + 64, left : left + 64].float()
            )
    corners = (uniform(torch.arange(4000), 1, 18) * 22).long()
    assert corners.min() == 0
    assert corners.max() == 21


def test_each_tile_is_standardised_by_itself_and_a_flat_one_stays_flat():
    tiles = torch.rand(2, 9, 3, 8, 8) * 40 + torch.arange(9).view(1, 9, 1, 1, 1) * 20
    out = standardised(tiles)
    assert out.mean((-2, -1)).abs().max() < 1e-4
    assert (
        out.std((-2, -1), correction=0) - 1
    ).abs().max() < 0.15  # an added grey level keeps flat tiles flat
    assert standardised(torch.full((1, 1, 3, 8, 8), 200.0)).abs().max() == 0


def test_grey_tiles_have_three_equal_channels():
    tiles = torch.rand(1, 9, 3, 4, 4) * 255
    out = luma(tiles)
    assert torch.equal(out[:, :, 0], out[:, :, 2])
    torch.testing.assert_close(
        out[0, 3, 1], 0.299 * tiles[0, 3, 0] + 0.587 * tiles[0, 3, 1] + 0.114 * tiles[0, 3, 2]
    )


def test_the_label_names_the_order_in_which_the_trunk_sees_the_tiles(monkeypatch):
    torch.manual_seed(0)
    method = Jigsaw(build_backbone("resnet18-w16"), Jigsaw.Config(permutations=6, hidden=8, grey=0.0), 32)
    (view,) = square(32)
    images = torch.randint(0, 256, (5, 3, view.size, view.size), dtype=torch.uint8)
    batch = Batch(views=(images,), index=torch.arange(5), key=torch.arange(5) * 11)
    seen = []
    monkeypatch.setattr(method.backbone.trunk, "forward", lambda x: (seen.append(x), torch.zeros(45, 128))[1])
    method(batch)
    tiles = standardised(cut(images, *sides(32), uniform(batch.key, 1, 18).view(5, 9, 2)))
    labels = (uniform(batch.key, 0, 1)[:, 0] * 6).long()
    assert len(labels.unique()) > 1
    for i in range(5):
        for place, number in enumerate(method.permutations[labels[i]].tolist()):
            torch.testing.assert_close(seen[0][9 * i + place], tiles[i, number])


def test_an_image_too_small_for_the_grid_is_refused():
    with pytest.raises(
        ConfigError, match=r"data\.size is 24; Jigsaw's tiles would have 7 pixels.*Set data\.size"
    ):
        square(24)


def test_jigmag_labels_are_uniform():
    orders = (uniform(torch.arange(48_000), 0, 1)[:, 0] * 24).long()
    counts = torch.bincount(orders, minlength=24)
    assert len(counts) == 24
    assert counts.sub(2000).abs().max() < 4.5 * math.sqrt(2000)
    method = JigMag(build_backbone("resnet18-w16"), JigMag.Config(hidden=8), 32)
    assert len({tuple(row) for row in method.orders.tolist()}) == 24


def test_jigmags_label_names_the_order_in_which_the_backbone_sees_the_levels(monkeypatch):
    torch.manual_seed(0)
    method = JigMag(build_backbone("resnet18-w16"), JigMag.Config(hidden=8), 32)
    images, key = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8), torch.arange(5) * 11
    seen = []
    monkeypatch.setattr(method.backbone, "forward", lambda x: (seen.append(x), torch.zeros(20, 128))[1])
    method(Batch(views=(images,), index=torch.arange(5), key=key))
    levels, labels = magnifications(images, 0.7, 16), (uniform(key, 0, 1)[:, 0] * 24).long()
    assert len(labels.unique()) > 1
    for i in range(5):
        for place, level in enumerate(method.orders[labels[i]].tolist()):
            torch.testing.assert_close(seen[0][4 * i + place], levels[i, level])


def test_magnifications_are_nested_about_the_centre():
    ramp = torch.arange(64.0).view(1, 1, 1, 64).expand(1, 3, 64, 64)
    levels = magnifications(ramp, 0.5, 16)
    assert levels.shape == (1, 4, 3, 16, 16)
    for level, width in enumerate((64, 32, 16, 8)):
        row = levels[0, level, 0, 8]
        assert row.mean().item() == pytest.approx(31.5, abs=0.01), "all share the centre"
        assert (row[-2] - row[1]).item() == pytest.approx(13 * width / 16, rel=0.05)


def test_a_mask_hides_the_share_it_should_in_places_of_chance():
    hidden = mask(torch.arange(500), 7, 0.6)
    assert hidden.shape == (500, 1, 7, 7)
    assert set(hidden.sum((1, 2, 3)).tolist()) == {29}
    share = hidden.float().mean((0, 1))
    assert (share - 29 / 49).abs().max() < 5 * math.sqrt(0.25 / 500)
    assert mask(torch.arange(3), 2, 0.999).sum((1, 2, 3)).tolist() == [3, 3, 3]
    assert mask(torch.arange(3), 2, 0.001).sum((1, 2, 3)).tolist() == [1, 1, 1]


def test_the_backbone_sees_nothing_of_a_hidden_patch():
    torch.manual_seed(0)
    method = Masked(build_backbone("resnet18-w16"), Masked.Config(patch=8), 32).eval()
    images, key = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), torch.tensor([3, 4])
    hidden = mask(key, 4, 0.6).repeat_interleave(8, 2).repeat_interleave(8, 3)
    seen = []
    method.backbone.feature_map = lambda x: (seen.append(x.clone()), torch.zeros(2, 128, 1, 1))[1]
    for value in (0, 255):
        other = torch.where(hidden, torch.tensor(value, dtype=torch.uint8), images)
        method(Batch(views=(other,), index=torch.arange(2), key=key))
    assert torch.equal(seen[0], seen[1])
    visible = ~hidden.expand(-1, 3, -1, -1)
    torch.testing.assert_close(seen[0][visible], method.backbone.normalise(images)[visible])


@pytest.mark.parametrize(("size", "patch"), [(224, 32), (64, 8), (96, 12), (32, 4)])
def test_the_automatic_patch_is_about_a_seventh_of_the_image(size, patch):
    assert Masked(build_backbone("resnet18-w16"), Masked.Config(), size).patch == patch


def test_a_patch_that_does_not_divide_the_image_is_refused():
    with pytest.raises(ConfigError, match=r"pretrain\.masked\.patch is 12; it must divide data\.size 32"):
        Masked(build_backbone("resnet18-w16"), Masked.Config(patch=12), 32)
