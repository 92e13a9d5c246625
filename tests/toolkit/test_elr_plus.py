"""ELR+: targets from the average, blends of images, labels and targets; without its options it is ELR."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from noisyssl.batch import Batch
from noisyssl.errors import ConfigError
from noisyssl.losses.elr import EarlyLearning
from noisyssl.objective import Given
from noisyssl.objectives.elr import EarlyLearningPlus, early_learning
from noisyssl.objectives.supervised import Supervised

N, K, B = 30, 3, 12
OK = torch.tensor(True)


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(12, K)

    def forward(self, images):
        return self.linear(images.flatten(1).to(self.linear.weight.dtype) / 255)


def built(**settings):
    return early_learning(
        Flat(), EarlyLearning.Config(**settings), Given(count=N, train=np.arange(N), classes=K)
    )


def batch(first=0):
    images = torch.randint(
        0, 256, (B, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(first)
    )
    index = torch.arange(first, first + B)
    return Batch(views=(images,), index=index, key=index * 7919 + 13, label=index % K)


def test_a_step_is_the_loop_of_the_paper():
    method, one = built(ema=0.9, mixup=1.0), batch()
    with torch.no_grad():
        method.slow.linear.weight.add_(0.3 * torch.randn(K, 12, generator=torch.Generator().manual_seed(5)))
    before = torch.rand(N, K, generator=torch.Generator().manual_seed(6))
    method.loss.targets.copy_(before / before.sum(1, keepdim=True))
    targets, total = method.loss.targets.clone(), 0.0
    share, partner = method.draw(one.key)
    for i in range(B):  # the average speaks of the plain images
        said = method.slow(one.views[0][i : i + 1]).softmax(1)[0].detach().clamp(1e-4, 1 - 1e-4)
        targets[one.index[i]] = 0.7 * targets[one.index[i]] + 0.3 * said / said.sum()
    for i in range(B):
        j, own = int(partner[i]), float(share[i])
        x = own * one.views[0][i].float() + (1 - own) * one.views[0][j].float()
        p = method.network(x[None]).softmax(1)[0]
        q = own * targets[one.index[i]] + (1 - own) * targets[one.index[j]]
        total = total - own * p[one.label[i]].log() - (1 - own) * p[one.label[j]].log()
        total = total + 3.0 * (1 - (p * q).sum()).log()
    found = method(one)["loss"]
    torch.testing.assert_close(found, total / B)
    method.loss.after_step(OK)
    torch.testing.assert_close(method.loss.targets, targets)
    ours = torch.autograd.grad(found, list(method.network.parameters()))
    theirs = torch.autograd.grad(total / B, list(method.network.parameters()))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_without_options_it_is_elr_and_an_average_that_never_lags_is_too():
    plain, plus = built(), built(ema=0.5)
    assert isinstance(plain, Supervised)
    assert isinstance(plus, EarlyLearningPlus)
    torch.testing.assert_close(
        plus(batch())["loss"], plain(batch())["loss"]
    )  # the average is the network yet
    for one in (plus, plain):
        one.loss.after_step(OK)
    assert plain.loss.targets.any()
    torch.testing.assert_close(plus.loss.targets, plain.loss.targets)
    nearly = built(mixup=1e-3)
    assert isinstance(nearly, EarlyLearningPlus)
    torch.testing.assert_close(nearly(batch())["loss"], built()(batch())["loss"], rtol=0.05, atol=0)


def test_the_average_begins_as_a_plain_mean_and_is_evaluated():
    method, seen = built(ema=0.6), []
    for step in range(5):
        with torch.no_grad():
            method.network.linear.bias.fill_(float(step))
        if step == 0:
            method.slow.linear.bias.data.fill_(0.0)
        method.after_step(0.0, OK)
        seen.append(float(method.slow.linear.bias[0]))
    # decays 1/2, then 0.6: 1 - 1 / (step + 1) is above it from the second step on
    expected, value = [], 0.0
    for step in range(5):
        decay = min(1 - 1 / (step + 2), 0.6)
        value = decay * value + (1 - decay) * step
        expected.append(value)
    assert seen == pytest.approx(expected)
    method.after_step(0.0, torch.tensor(False))  # a skipped step moves nothing
    assert float(method.slow.linear.bias[0]) == pytest.approx(expected[-1])
    assert float(method.steps) == 5
    assert method.classifier() is method.slow
    assert not any(p.requires_grad for p in method.slow.parameters())
    assert built(mixup=1.0).classifier() is not None
    assert math.isclose(sum(p.numel() for g in method.parameter_groups() for p in g["params"]), 39)


def test_memory_follows_the_row_and_a_checkpoint_holds_everything():
    method = built(ema=0.9, mixup=1.0)
    one, turned = batch(5), torch.randperm(B, generator=torch.Generator().manual_seed(1))
    method(one)
    other = built(ema=0.9, mixup=1.0)
    other(
        Batch(
            views=(one.views[0][turned],), index=one.index[turned], key=one.key[turned],
            label=one.label[turned],
        )
    )  # fmt: skip
    method.after_step(0.1, OK)
    other.after_step(0.1, OK)
    torch.testing.assert_close(method.loss.targets, other.loss.targets)
    assert method.loss.targets[5 : 5 + B].any(1).all()
    assert not method.loss.targets[:5].any()
    again = built(ema=0.9, mixup=1.0)
    again.load_state_dict(copy.deepcopy(method.state_dict()))
    torch.testing.assert_close(again(batch()), method(batch()))


def test_gradients_reach_the_network_under_autocast():
    for settings in ({"mixup": 1.0}, {"ema": 0.9}):
        method = built(**settings)
        with torch.autocast("cpu", torch.bfloat16):
            terms = method(batch())
        terms["loss"].backward()
        assert all(p.grad.abs().sum() > 0 for p in method.network.parameters())


@pytest.mark.parametrize("name", ["ema", "mixup"])
def test_options_outside_their_range_are_refused(name):
    with pytest.raises(ConfigError, match=rf"train\.elr\.{name} is -0\.5"):
        EarlyLearning.Config(**{name: -0.5})
