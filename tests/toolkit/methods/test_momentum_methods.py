"""Laws of networks that follow another one, and of MoCo's queue."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from noisyssl.backbones import build_backbone
from noisyssl.batch import Batch
from noisyssl.errors import ConfigError
from noisyssl.layers import SplitBatchNorm2d
from noisyssl.methods import METHODS
from noisyssl.methods.dino import DINO
from noisyssl.methods.moco2 import KEYS, QUERIES, MoCoV2, contrast, parts_of_a_share
from noisyssl.momentum import follow, rising, twin
from noisyssl.philox import uniform

OK, SKIPPED = torch.tensor(True), torch.tensor(False)
SLOW = {"moco2": "key", "moco3": "key", "byol": "target", "dino": "teacher"}
OPTIONS = {
    "moco2": {"queue": 32, "splits": 2}, "moco3": {"hidden": 32}, "byol": {"hidden": 32},
    "dino": {"prototypes": 16, "hidden": 32},
}  # fmt: skip


def build(name):
    torch.manual_seed(0)
    return METHODS[name](build_backbone("resnet18-w16"), METHODS[name].Config(**OPTIONS[name]), 32)


def batch_for(name, seed=0, count=4):
    generator = torch.Generator().manual_seed(seed)
    views = tuple(
        torch.randint(0, 256, (count, 3, v.size, v.size), dtype=torch.uint8, generator=generator)
        for v in METHODS[name].views(32)
    )
    return Batch(views=views, index=torch.arange(count), key=torch.arange(count) + 10 * seed)


def test_follow_is_a_weighted_mean_of_parameters_and_leaves_buffers():
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    slow = twin(network)
    assert not any(p.requires_grad for p in slow.parameters())
    before = [p.clone() for p in slow.parameters()]
    with torch.no_grad():
        for p in network.parameters():
            p += torch.randn_like(p)
        network[1].running_mean += 5
    follow(slow, network, 0.9, SKIPPED)
    assert all(torch.equal(p, old) for p, old in zip(slow.parameters(), before, strict=True))
    follow(slow, network, 0.9, OK)
    for p, old, new in zip(slow.parameters(), before, network.parameters(), strict=True):
        torch.testing.assert_close(p, 0.9 * old + 0.1 * new)
    assert slow[1].running_mean.abs().max() == 0


def test_momentum_rises_from_its_start_to_one_along_a_cosine():
    assert rising(0.99, 0.0) == pytest.approx(0.99)
    assert rising(0.99, 0.5) == pytest.approx(0.995)
    assert rising(0.99, 1.0) == 1.0
    assert rising(0.5, 0.25) == pytest.approx(1 - 0.5 * (math.cos(math.pi / 4) + 1) / 2)


@pytest.mark.parametrize("name", SLOW)
def test_the_slow_network_follows_its_schedule_and_gets_no_gradient(name):
    method = build(name)
    slow = getattr(method, SLOW[name])
    method(batch_for(name))["loss"].backward()
    assert all(p.grad is None for p in slow.parameters())
    before = [p.clone() for p in slow.parameters()]
    head = method.head if name == "dino" else method.projector
    online = [*method.backbone.parameters(), *head.parameters()]
    with torch.no_grad():
        for p in online:
            p += 0.5
    method.after_step(0.5, OK)
    start = method.config.momentum if name == "dino" else method.momentum
    momentum = start if name == "moco2" else rising(start, 0.5)
    for p, old, new in zip(slow.parameters(), before, online, strict=True):
        torch.testing.assert_close(p, momentum * old + (1 - momentum) * new)


@pytest.mark.parametrize(("name", "compare"), [("byol", "distance"), ("moco3", "contrast")])
def test_each_view_is_compared_with_what_the_slow_network_says_of_the_other(name, compare, monkeypatch):
    method, batch = build(name).eval(), batch_for(name)  # eval: a BatchNorm does not mix the views
    pairs = []
    monkeypatch.setattr(
        f"noisyssl.methods.{name}.{compare}",
        lambda *given: (pairs.append(given[:2]), given[0].sum())[1],
    )
    method(batch)
    slow = getattr(method, SLOW[name])
    for (prediction, goal), (mine, other) in zip(pairs, [(0, 1), (1, 0)], strict=True):
        network = nn.Sequential(method.backbone, method.projector, method.predictor)
        torch.testing.assert_close(prediction, network(batch.views[mine]))
        torch.testing.assert_close(goal, slow(batch.views[other]))


def test_the_queue_is_first_in_first_out_and_never_holds_the_current_positives(monkeypatch):
    method = build("moco2")  # 32 places, 4 images of 2 views a step
    seen = []

    def spy(query, key, queue, temperature):
        seen.append((key.clone(), queue.clone()))
        return contrast(query, key, queue, temperature)

    monkeypatch.setattr("noisyssl.methods.moco2.contrast", spy)
    history = list(method.queue.clone())
    for step in range(6):
        method(batch_for("moco2", step))
        (second, queue), (first, _) = seen[-2:]
        for key in (*first, *second):
            assert (queue @ key).max() < 0.9999
        method.after_step(0.5, OK)
        history = [*history, *first, *second][-32:]
        in_order = method.queue.roll(-int(method.pointer) % 32, 0)
        torch.testing.assert_close(in_order, torch.stack(history))


def test_a_skipped_step_adds_nothing_to_the_queue():
    method = build("moco2")
    before = method.queue.clone()
    method(batch_for("moco2"))
    method.after_step(0.5, SKIPPED)
    assert torch.equal(method.queue, before)
    assert method.pointer == 0
    method(batch_for("moco2"))
    method.after_step(0.5, OK)
    assert method.pointer == 8
    assert not torch.equal(method.queue, before)


@pytest.mark.parametrize(
    ("queue", "batch", "said"),
    [(32, 64, r"queue is 32; .*multiple of twice the batch, 128.*queue=128"), (96, 20, r"queue=120"),
     (32, 3, r"pretrain\.batch is 3, but BatchNorm sees it in 2 parts.*at least 4")],
)  # fmt: skip
def test_a_queue_that_does_not_fit_the_batch_is_refused(queue, batch, said):
    method = MoCoV2(build_backbone("resnet18-w16"), MoCoV2.Config(queue=queue, splits=2), 32)
    with pytest.raises(ConfigError, match=said):
        method.must_accept(batch)


def test_a_split_batch_norm_is_a_batch_norm_of_each_part():
    torch.manual_seed(0)
    plain, images = nn.BatchNorm2d(3), torch.randn(8, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    network = nn.Sequential(nn.BatchNorm2d(3))
    SplitBatchNorm2d.replace(network, 4)
    out = network(images)
    torch.testing.assert_close(out, torch.cat([nn.BatchNorm2d(3)(part) for part in images.chunk(4)]))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert not torch.allclose(out, plain(images), atol=0.1)
    network.eval()
    same = nn.BatchNorm2d(3).eval()
    same.load_state_dict(network[0].state_dict())
    assert torch.equal(network(images), same(images))


@pytest.mark.parametrize(("images", "splits"), [(25, 8), (7, 4), (3, 2), (2, 8)])
def test_no_part_of_a_split_batch_norm_is_a_single_image(images, splits):
    """A batch that the parts do not divide, or that lost a broken file: one image has no variance."""
    network = nn.Sequential(nn.BatchNorm2d(3))
    SplitBatchNorm2d.replace(network, splits)
    assert network(torch.randn(images, 3, 1, 1)).shape == (images, 3, 1, 1)


def test_queries_and_keys_meet_other_images_in_their_batch_norms():
    key = torch.arange(64)
    parts = [
        {frozenset(part.tolist()) for part in uniform(key, stream, 1)[:, 0].argsort().chunk(8)}
        for stream in (QUERIES, KEYS)
    ]
    assert not parts[0] & parts[1]


@pytest.mark.parametrize(
    ("splits", "processes", "parts"), [(8, 1, 8), (8, 2, 4), (8, 4, 2), (8, 8, 2), (1, 4, 1), (1, 1, 1)]
)
def test_processes_share_the_parts_of_a_batch_and_have_two_at_least(splits, processes, parts, monkeypatch):
    assert parts_of_a_share(splits, processes) == parts
    monkeypatch.setattr("noisyssl.methods.moco2.world", lambda: processes)
    method = MoCoV2(build_backbone("resnet18-w16"), MoCoV2.Config(queue=512, splits=splits), 32)
    assert method.backbone.trunk.bn1.splits == parts
    method.must_accept(32)
    if (least := 2 * parts * processes) > 2:
        with pytest.raises(ConfigError, match=rf"sees it in {parts * processes} parts.*at least {least}"):
            method.must_accept(least - 1)


def test_dinos_centre_is_the_running_mean_of_the_teachers_outputs():
    method, batch = build("dino"), batch_for("dino")
    with torch.no_grad():
        outputs = method.teacher(torch.cat(batch.views[:2]))
    method = build("dino")
    method(batch)
    method.after_step(0.1, OK)
    torch.testing.assert_close(method.centre, 0.1 * outputs.mean(0), rtol=1e-4, atol=1e-6)


def test_dinos_prototypes_rest_at_first_and_then_learn():
    method, batch = build("dino"), batch_for("dino")
    method(batch)["loss"].backward()
    assert method.head.prototypes.grad.abs().max() == 0
    assert method.head.layers[0].weight.grad.abs().max() > 0
    method.after_step(0.5, OK)
    method(batch)["loss"].backward()
    assert method.head.prototypes.grad.abs().max() > 0


def test_dino_compares_no_view_with_itself():
    (large, _, *small) = DINO.views(224)
    assert [view.size for view in (large, *small)] == [224] + [96] * 6
    goal = torch.eye(4) * 50
    from noisyssl.methods.dino import cross_entropy

    away = goal.roll(1, 0)
    loss = cross_entropy((goal, goal), (goal, away), torch.zeros(4), 1.0, 1.0)
    # teacher 1 against student 2 agrees, teacher 2 against student 1 does not; the diagonal is left out
    assert loss.item() == pytest.approx((0 + 50) / 2, abs=1e-3)


@pytest.mark.parametrize("temperature", [0.01, 0.07, 0.5])
@pytest.mark.parametrize("name", ["moco2", "moco3"])
def test_contrast_is_finite_and_agrees_in_every_precision(name, temperature):
    from noisyssl.methods import moco3

    generator = torch.Generator().manual_seed(0)
    a, b, queue = torch.randn(3, 32, 16, generator=generator).unbind()
    a, b, queue = (F.normalize(z, dim=1) for z in (a, a + 0.3 * b, queue))

    def loss(*z):
        return contrast(*z, queue, temperature)[0] if name == "moco2" else moco3.contrast(*z, temperature)

    full = loss(a, b)
    assert full.isfinite()
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            half = loss(a.to(dtype), b.to(dtype))
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, full, rtol=0.05, atol=0.05)
