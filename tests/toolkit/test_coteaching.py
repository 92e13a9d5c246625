"""Co-teaching: who teaches whom, how much is forgotten, and the estimated rate."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from noisyssl import mixture
from noisyssl.batch import Batch
from noisyssl.errors import ConfigError
from noisyssl.objective import Given
from noisyssl.objectives.coteaching import CoTeaching

N, K = 40, 3


class Flat(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(12, K)

    def forward(self, images):
        return self.linear(images.flatten(1) / 255)


def built(**settings):
    labels = np.arange(N) % K
    given = Given(count=N, train=np.arange(30), classes=K, labels=labels, another=lambda: Flat(1))
    return CoTeaching(Flat(0), CoTeaching.Config(**settings), given)


def batch(size=16):
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (size, 3, 2, 2), dtype=torch.uint8, generator=generator)
    index = torch.arange(size)
    return Batch(views=(images,), index=index, key=index, label=index % K)


def epochs(method, count, predict=None):
    for _ in range(count):
        method.before_epoch(predict)
    return method


def test_a_step_is_the_loop_of_algorithm_1():
    method, one = epochs(built(rate="0.4", ramp=4), 3), batch()  # two epochs are over: R = 0.4 * 2 / 4
    assert method.forgotten() == pytest.approx(0.2)
    kept = 13  # of 16, rounded up
    losses = []
    for network in (method.network, method.other):
        log_p = network(one.views[0]).log_softmax(1)
        losses.append([-log_p[i, one.label[i]] for i in range(16)])
    easy = [sorted(range(16), key=lambda i, own=own: float(own[i].detach()))[:kept] for own in losses]
    expected = sum(losses[0][i] for i in easy[1]) / kept + sum(losses[1][i] for i in easy[0]) / kept
    assert easy[0] != easy[1]
    found = method(one)["loss"]
    torch.testing.assert_close(found, expected)
    ours = torch.autograd.grad(found, list(method.parameters()))
    theirs = torch.autograd.grad(expected, list(method.parameters()))
    torch.testing.assert_close(ours, theirs)


def test_the_forgotten_share_follows_its_schedule():
    method = built(rate="0.5", ramp=4)
    shares = []
    for _ in range(7):
        epochs(method, 1)
        shares.append(method.forgotten())
    assert shares == [0, 0.125, 0.25, 0.375, 0.5, 0.5, 0.5]


def test_auto_learns_on_all_first_then_estimates_the_rate_once():
    method, asked = built(warmup=2, ramp=4), []

    def predict(rows):
        asked.append(rows)
        logits = np.zeros((len(rows), K), np.float32)
        right = np.where(
            np.arange(len(rows)) % 5 == 0, (rows + 1) % K, rows % K
        )  # a fifth contradicts its label
        logits[np.arange(len(rows)), right] = 4 + 0.1 * np.random.default_rng(0).standard_normal(len(rows))
        return logits

    shares = []
    for _ in range(8):
        epochs(method, 1, predict)
        shares.append(method.forgotten())
    assert len(asked) == 1  # half of two epochs
    assert np.array_equal(asked[0], np.arange(30))
    rate = float(method.rate)
    assert rate == pytest.approx(0.2, abs=0.01)
    facts = method.facts()
    assert facts["noise_rate"] == rate
    assert 0 < facts["error"] < 0.1
    assert not facts["oracle"]
    assert built(rate="0.3").facts() == {"noise_rate": 0.3, "error": None, "oracle": True}
    assert shares == pytest.approx([0, 0, 0, rate / 4, rate / 2, 3 * rate / 4, rate, rate])


def test_the_rate_is_that_of_the_mean_losses_over_the_second_half_of_the_warmup():
    rng, wrong, heard = np.random.default_rng(0), np.arange(30) % 5 == 0, []

    def predict(rows):
        """A network that takes one class for the next one, another class in every epoch."""
        logits = 0.5 * rng.standard_normal((30, K)).astype(np.float32)
        told = np.where(wrong, (rows + 1) % K, rows % K)
        told = np.where(rows % K == len(heard) % K, (rows + 2) % K, told)
        logits[np.arange(30), told] += 3
        heard.append(mixture.cross_entropies(logits, rows % K))
        return logits

    method = epochs(built(warmup=6, ramp=4), 5, predict)
    half = built(warmup=6, ramp=4)
    half.load_state_dict(copy.deepcopy(method.state_dict()))  # the losses so far are part of a checkpoint
    method = epochs(half, 3, predict)
    assert len(heard) == 3  # before the fifth, sixth and seventh epoch
    assert float(method.rate) == pytest.approx(mixture.noise_rate(np.mean(heard, axis=0))[0])
    assert float(method.rate) != pytest.approx(mixture.noise_rate(heard[-1])[0], abs=0.05)
    assert float(method.rate) == pytest.approx(0.2, abs=0.05)


def test_the_networks_differ_and_a_checkpoint_holds_both_and_the_schedule():
    method = epochs(built(rate="0.5", ramp=4), 3)
    assert not torch.equal(method.network.linear.weight, method.other.linear.weight)
    again = built(rate="0.5", ramp=4)
    again.load_state_dict(copy.deepcopy(method.state_dict()))
    assert again.forgotten() == method.forgotten() == 0.25  # in the midst of the same epoch
    torch.testing.assert_close(again(batch())["loss"], method(batch())["loss"])
    assert again.classifier() is again.network


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": "1.2"}, r"train\.coteaching\.rate is 1\.2; it must be auto or a number in \[0, 1\)"),
        ({"rate": "much"}, r"train\.coteaching\.rate is much"),
        ({"ramp": 0}, r"train\.coteaching\.ramp is 0"),
    ],
)
def test_settings_outside_their_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        CoTeaching.Config(**settings)


def test_the_mixture_tells_two_populations_apart():
    rng = np.random.default_rng(0)
    losses = np.concatenate([rng.normal(0.2, 0.1, 700), rng.normal(3.0, 0.5, 300)])
    clean = mixture.clean_probability(losses)
    assert (clean[:700] > 0.5).mean() > 0.99
    assert (clean[700:] < 0.5).mean() > 0.99
    rate, error = mixture.noise_rate(losses)
    assert rate == pytest.approx(0.3, abs=0.02)
    assert 0 < error < 0.03
    assert (mixture.clean_probability(np.full(9, 2.0)) == 1).all()
    logits, labels = rng.standard_normal((20, 4)) * 50, rng.integers(0, 4, 20)
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits), torch.from_numpy(labels), reduction="none"
    )
    np.testing.assert_allclose(mixture.cross_entropies(logits, labels), expected.numpy(), atol=1e-9)
