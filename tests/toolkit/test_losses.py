import math

import pytest
import torch
from torch import nn

from noisyssl.errors import ConfigError
from noisyssl.losses import LOSSES


def build(name, **settings):
    return LOSSES[name](LOSSES[name].Config(**settings))


def batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(32, 5, generator=generator, dtype=dtype)
    return logits, torch.randint(5, (32,), generator=generator), torch.arange(32)


def naive_ce(logits, label):
    total = 0.0
    for row, y in zip(logits.double().tolist(), label.tolist(), strict=True):
        total -= math.log(math.exp(row[y]) / sum(map(math.exp, row)))
    return total / len(label)


def naive_gce(logits, label, q=0.7):
    total = 0.0
    for row, y in zip(logits.double().tolist(), label.tolist(), strict=True):
        total += (1 - (math.exp(row[y]) / sum(map(math.exp, row))) ** q) / q
    return total / len(label)


NAIVE = {"ce": naive_ce, "gce": naive_gce}


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_loop_written_from_the_paper(name):
    logits, label, index = batch()
    assert build(name)(logits, label, index).item() == pytest.approx(NAIVE[name](logits, label), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_that_of_the_formula(name):
    logits, label, index = batch(torch.float64)
    loss = build(name)
    assert torch.autograd.gradcheck(lambda x: loss.formula(x, label, index), logits.requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
def test_a_constant_added_to_all_logits_changes_nothing(name):
    logits, label, index = batch()
    loss = build(name)
    torch.testing.assert_close(loss(logits + 20, label, index), loss(logits, label, index), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_a_finite_float32_loss_even_under_autocast(name, dtype):
    logits = torch.tensor([[60.0, -60, 0], [-60, 60, 0]], dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = build(name)(logits, torch.tensor([0, 0]), torch.arange(2))
    assert loss.dtype == torch.float32
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    wide = build(name)(logits.detach().float(), torch.tensor([0, 0]), torch.arange(2))
    torch.testing.assert_close(loss, wide)


def test_gce_meets_its_two_limits():
    logits, label, index = batch()
    ce = nn.functional.cross_entropy(logits, label)
    mae = (1 - logits.softmax(1).gather(1, label[:, None])).mean()
    torch.testing.assert_close(build("gce", q=1e-4)(logits, label, index), ce, rtol=2e-3, atol=0)
    torch.testing.assert_close(build("gce", q=1.0)(logits, label, index), mae)


def test_gce_pulls_a_contradicted_label_with_p_to_the_q():
    logits, label, index = batch(torch.float64)
    weights = logits.softmax(1).gather(1, label[:, None]) ** 0.7
    (gce,) = torch.autograd.grad(build("gce").formula(logits.requires_grad_(), label, index), logits)
    (ce,) = torch.autograd.grad(build("ce").formula(logits, label, index), logits)
    torch.testing.assert_close(gce, weights * ce)


@pytest.mark.parametrize("q", [0.0, -0.5, 1.2, float("nan")])
def test_gce_refuses_q_outside_its_range(q):
    with pytest.raises(ConfigError, match=r"train\.gce\.q is .*\(0, 1\]\. Use --objective ce"):
        LOSSES["gce"].Config(q=q)
