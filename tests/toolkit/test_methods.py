"""The contract of every method in the table, then the laws of each."""

import math

import pytest
import torch

from noisyssl.backbones import build_backbone
from noisyssl.batch import Batch
from noisyssl.errors import ConfigError
from noisyssl.methods import METHODS
from noisyssl.methods.rotation import CROP, TURN, crop, large_square, rotate
from noisyssl.methods.simclr import nt_xent
from noisyssl.philox import uniform
from noisyssl.views import View

SIZE = 32


def build(name: str, seed: int = 0):
    torch.manual_seed(seed)
    return METHODS[name](build_backbone("resnet18-w16"), METHODS[name].Config(), SIZE)


def batch_for(name: str, count: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(0)
    views = tuple(
        torch.randint(0, 256, (count, 3, view.size, view.size), dtype=torch.uint8, generator=generator).to(
            memory_format=torch.channels_last
        )
        for view in METHODS[name].views(SIZE)
    )
    key = torch.randint(-(2**62), 2**62, (count,), generator=generator)
    return Batch(views=views, index=torch.arange(count), key=key)


def permuted(batch: Batch, order: torch.Tensor) -> Batch:
    return Batch(views=tuple(v[order] for v in batch.views), index=batch.index[order], key=batch.key[order])


@pytest.mark.parametrize("name", METHODS)
def test_gradient_reaches_every_parameter(name):
    method = build(name)
    terms = method(batch_for(name))
    assert terms["loss"].dtype == torch.float32
    assert all(value.ndim == 0 and value.isfinite() for value in terms.values())
    terms["loss"].backward()
    for where, parameter in method.named_parameters():
        assert parameter.grad is not None, where
        assert parameter.grad.isfinite().all(), where
    # the last BatchNorm of a block starts at weight 0, so what lies before it inside the block gets none yet
    assert method.backbone.trunk.conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_a_batch_does_not_matter(name):
    method, batch = build(name), batch_for(name)
    order = torch.randperm(len(batch.index), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        method(permuted(batch, order))["loss"], method(batch)["loss"], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_a_function_of_its_batch(name):
    """No hidden randomness: what a method draws comes from the batch's keys."""
    batch = batch_for(name)
    first = build(name)(batch)["loss"]
    torch.manual_seed(99)
    method = build(name)
    torch.manual_seed(100)
    assert torch.equal(method(batch)["loss"], first)


@pytest.mark.parametrize("name", METHODS)
def test_labels_are_never_read(name):
    method, batch = build(name), batch_for(name)
    labelled = Batch(views=batch.views, index=batch.index, key=batch.key, label=torch.arange(8))
    assert torch.equal(method(batch)["loss"], method(labelled)["loss"])


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_is_optimised_once(name):
    method = build(name)
    grouped = [p for group in method.parameter_groups() for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in method.parameters()}
    assert len(grouped) == len({id(p) for p in grouped})


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_finite_in_half_precision(name, dtype):
    method, batch = build(name), batch_for(name)
    full = method(batch)["loss"]
    with torch.autocast("cpu", dtype):
        half = method(batch)["loss"]
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.1, atol=0.1)


def test_nt_xent_is_equation_one():
    a, b = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).unbind()
    z = [row / row.norm() for row in torch.cat([a, b])]
    total = 0.0
    for i in range(10):
        j = (i + 5) % 10
        others = sum(math.exp(float(z[i] @ z[k]) / 0.3) for k in range(10) if k != i)
        total -= math.log(math.exp(float(z[i] @ z[j]) / 0.3) / others)
    assert nt_xent(a, b, 0.3)[0].item() == pytest.approx(total / 10, rel=1e-5)


def test_nt_xent_knows_its_limits():
    eye = torch.eye(8)
    loss, agreement = nt_xent(eye, eye, 0.05)  # partners equal, all others orthogonal
    assert loss.item() == pytest.approx(math.log(1 + 14 * math.exp(-20)), abs=1e-6)
    assert agreement.item() == 1.0
    same = torch.ones(8, 3)
    assert nt_xent(same, same, 0.5)[0].item() == pytest.approx(
        math.log(15), rel=1e-6
    )  # nothing to tell apart
    a, b = torch.randn(2, 6, 4).unbind()
    assert torch.allclose(nt_xent(a, b, 0.2)[0], nt_xent(b, a, 0.2)[0])
    assert torch.allclose(nt_xent(a, b, 0.2)[0], nt_xent(3 * a, 0.1 * b, 0.2)[0])


@pytest.mark.parametrize("temperature", [0.01, 0.07, 0.5])
def test_nt_xent_is_finite_and_agrees_in_every_precision(temperature):
    a, b = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(0)).unbind()
    b = a + 0.3 * b
    full = nt_xent(a, b, temperature)[0]
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            half = nt_xent(a.to(dtype), b.to(dtype), temperature)[0]
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, full, rtol=0.05, atol=0.02)


def test_simclr_refuses_a_temperature_of_zero():
    with pytest.raises(ConfigError, match=r"pretrain\.simclr\.temperature is 0"):
        METHODS["simclr"].Config(temperature=0.0)


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
    method, batch = build("rotation"), batch_for("rotation")
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
    losses = [build("rotation", seed)(batch_for("rotation", 64))["loss"].item() for seed in range(3)]
    assert sum(losses) / 3 == pytest.approx(math.log(4), abs=0.4)
