import copy
import math

import pytest
import torch
from torch import nn

from noisyssl.errors import ConfigError
from noisyssl.optim import LARS, build_optimizer, cosine, update


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2)
    ).to(memory_format=torch.channels_last)


def groups(model: nn.Module) -> list[dict]:
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": weights, "adapt": True}, {"params": others, "adapt": False, "weight_decay": 0.0}]


def backward(model: nn.Module, seed: int) -> None:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    model(x.to(memory_format=torch.channels_last)).square().sum().backward()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_fused_kernels_compute_what_the_plain_loop_does(name):
    """Also for channels-last weights, whose memory order differs from their index order."""
    ours = net()
    plain = copy.deepcopy(ours)
    fused = build_optimizer(groups(ours), name, lr=0.01, weight_decay=0.1)
    kind = torch.optim.SGD if name == "sgd" else torch.optim.AdamW
    extra = {"momentum": 0.9} if name == "sgd" else {}
    loop = kind(groups(plain), lr=0.01, weight_decay=0.1, foreach=False, fused=False, **extra)
    for seed in range(3):
        for model, optimizer in ((ours, fused), (plain, loop)):
            optimizer.zero_grad()
            backward(model, seed)
            optimizer.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_lars_is_its_formula():
    """Two steps by hand: v = m v + eta |w| / |g + wd w| (g + wd w); w -= lr v. Biases: plain SGD."""
    w, b = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([1.0]))
    optimizer = build_optimizer(
        [{"params": [w], "adapt": True}, {"params": [b], "adapt": False, "weight_decay": 0.0}],
        "lars", lr=0.5, weight_decay=0.1, momentum=0.9,
    )  # fmt: skip
    expected_w, expected_b, v, vb = [3.0, 4.0], 1.0, [0.0, 0.0], 0.0
    for g, gb in (([1.0, 2.0], 0.5), ([-2.0, 0.5], -1.0)):
        w.grad, b.grad = torch.tensor([g]), torch.tensor([gb])
        optimizer.step()
        d = [gi + 0.1 * wi for gi, wi in zip(g, expected_w, strict=True)]
        trust = 0.001 * math.hypot(*expected_w) / math.hypot(*d)
        v = [0.9 * vi + trust * di for vi, di in zip(v, d, strict=True)]
        expected_w = [wi - 0.5 * vi for wi, vi in zip(expected_w, v, strict=True)]
        vb = 0.9 * vb + gb
        expected_b -= 0.5 * vb
        assert w[0].tolist() == pytest.approx(expected_w, rel=1e-5)
        assert b.item() == pytest.approx(expected_b, rel=1e-5)
    assert isinstance(optimizer, LARS)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_a_step_that_is_not_ok_changes_nothing(name):
    model = net()
    optimizer = build_optimizer(groups(model), name, lr=0.1, weight_decay=0.1)
    backward(model, 0)
    update(optimizer, torch.tensor(True))
    before = [p.clone() for p in model.parameters()], copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    backward(model, 1)
    next(model.parameters()).grad.fill_(torch.nan)
    update(optimizer, torch.tensor(False))
    for p, old in zip(model.parameters(), before[0], strict=True):
        assert torch.equal(p, old)
    for i, slots in optimizer.state_dict()["state"].items():
        for slot, value in slots.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(before[1]["state"][i][slot]))


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_fused_kernels_skip_where_found_inf_says_so(name):
    """The mechanism that spares a GPU the wait; the CPU kernels have it as well."""
    model = net()
    optimizer = build_optimizer(groups(model), name, lr=0.1, weight_decay=0.0)
    backward(model, 0)
    before = [p.clone() for p in model.parameters()]
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert not all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_a_skipped_first_step_leaves_no_trace(name):
    """fp16 scaling usually skips the first step; torch's fused SGD would keep uninitialised momentum."""
    skipped, plain = net(), net()
    for model, first in ((skipped, True), (plain, False)):
        optimizer = build_optimizer(groups(model), name, lr=0.1, weight_decay=0.01)
        if first:
            backward(model, 5)
            optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(1.0)
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
            optimizer.zero_grad()
        backward(model, 0)
        optimizer.step()
    for a, b in zip((p for n, p in skipped.named_parameters()), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_schedule_rises_then_falls():
    assert cosine(0.0, 0.1) == 0.0
    assert cosine(0.05, 0.1) == pytest.approx(0.5)
    assert cosine(0.1, 0.1) == pytest.approx(1.0)
    assert cosine(0.55, 0.1) == pytest.approx(0.5)
    assert cosine(1.0, 0.1) == pytest.approx(0.0)
    assert cosine(0.0, 0.0) == 1.0


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ConfigError, match="optimizer 'adagrad' is unknown"):
        build_optimizer([], "adagrad", lr=1, weight_decay=0)
