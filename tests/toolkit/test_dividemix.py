"""DivideMix: the split, who gets whose, co-refinement, co-guessing, and the step of algorithm 1 as a loop."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from noisyssl.batch import Batch
from noisyssl.errors import ConfigError
from noisyssl.objective import Given
from noisyssl.objectives.dividemix import Both, DivideMix
from noisyssl.selection import no_class_starved

N, K, B = 60, 3, 16
LABELS = np.arange(N) % K


class Flat(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(12, K)

    def forward(self, images):
        return self.linear(images.flatten(1).to(self.linear.weight.dtype) / 255)


def built(labels=LABELS, epochs=None, **settings):
    given = Given(
        count=len(labels),
        train=np.arange(45),
        classes=K,
        labels=labels,
        epochs=epochs,
        another=lambda: Flat(1),
    )
    return DivideMix(Flat(0), DivideMix.Config(**settings), given)


def batch(size=B, first=0):
    generator = torch.Generator().manual_seed(3)
    views = tuple(
        torch.randint(0, 256, (size, 3, 2, 2), dtype=torch.uint8, generator=generator) for _ in range(2)
    )
    index = torch.arange(first, first + size)
    return Batch(views=views, index=index, key=index * 7919 + 13, label=index % K)


def two_populations(rows, wrong, seed=0):
    """Logits that agree with the label of each row, but for those in `wrong`."""
    rng = np.random.default_rng(seed)
    said = np.where(np.isin(rows, wrong), (rows + 1) % K, rows % K)
    logits = np.zeros((len(rows), K), np.float32)
    logits[np.arange(len(rows)), said] = 5 + 0.2 * rng.standard_normal(len(rows))
    return logits


WRONG = ([0, 4, 8, 12], [1, 2, 3, 20, 30])
"""Rows that the first network contradicts, and the second."""


def predict(rows, module=None):
    assert isinstance(module, Both)
    return np.concatenate([two_populations(rows, wrong, k) for k, wrong in enumerate(WRONG)], axis=1)


def after(method, epochs):
    for _ in range(epochs):
        method.before_epoch(predict)
    return method


def test_each_network_gets_the_split_of_the_other():
    method = after(built(warmup=1), 2)
    for number in range(2):
        kept = (method.clean[number, :45] > 0.5).numpy()
        assert np.flatnonzero(~kept).tolist() == WRONG[1 - number]
    assert not method.clean[:, 45:].any()  # validation and test rows
    assert float(method.rate) == pytest.approx(0.1, abs=0.01)  # 4 and 5 of 45
    assert 0 < method.facts()["error"] < 0.1
    assert method.facts()["refilled"] == {}
    assert not method.facts()["oracle"]


def naive_step(method, one, weight):
    """Lines 8 to 26 of algorithm 1, sample by sample; each network by its own draws."""
    networks = (method.network, method.other)
    views = [view.float() for view in one.views]
    p = [[[n(v[i : i + 1]).softmax(1)[0] for v in views] for i in range(B)] for n in networks]

    def sharpen(row):
        powers = [x ** (1 / 0.5) for x in row]
        return [x / sum(powers) for x in powers]

    total = 0.0
    for k, network in enumerate(networks):
        targets, kept = [], []
        for i in range(B):
            w, y = float(method.clean[k, one.index[i]]), int(one.label[i])
            own = [sum(p[k][i][m][c].item() for m in range(2)) / 2 for c in range(K)]
            both = [sum(p[j][i][m][c].item() for m in range(2) for j in range(2)) / 4 for c in range(K)]
            refined = sharpen([w * (c == y) + (1 - w) * own[c] for c in range(K)])
            kept.append(w > 0.5)
            targets.append(refined if w > 0.5 else sharpen(both))
        share, partner = method.draw(one.key, k)
        labelled, unlabelled, mean = [], [], 0.0
        for m in range(2 * B):
            j, own = int(partner[m]), max(float(share[m]), 1 - float(share[m]))
            assert own == float(share[m])
            x = own * views[m // B][m % B] + (1 - own) * views[j // B][j % B]
            t = [own * a + (1 - own) * b for a, b in zip(targets[m % B], targets[j % B], strict=True)]
            q = network(x[None]).softmax(1)[0]
            mean = mean + q / (2 * B)
            if kept[m % B]:
                labelled.append(-sum(t[c] * q[c].log() for c in range(K)))
            else:
                unlabelled.append(sum((q[c] - t[c]) ** 2 for c in range(K)) / K)
        prior = sum(1 / K * (math.log(1 / K) - mean[c].log()) for c in range(K))
        total = total + sum(labelled) / len(labelled) + weight * sum(unlabelled) / len(unlabelled) + prior
    return total


def test_a_step_is_the_loop_of_algorithm_1():
    method = after(built(warmup=1, unlabelled=3.0, ramp=4), 3)
    method.clean[:, :B] += 0.3 * (torch.rand(2, B, generator=torch.Generator().manual_seed(0)) - 0.5)
    method.clean.clamp_(0, 1)
    one = batch()
    assert float(method.weight) == pytest.approx(3.0 * 1.5 / 4)
    found, expected = method(one)["loss"], naive_step(method, one, 3.0 * 1.5 / 4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    ours = torch.autograd.grad(found, list(method.parameters()))
    theirs = torch.autograd.grad(expected, list(method.parameters()))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_targets_of_a_toy_with_a_known_answer():
    method = built()
    half = method.sharpened(torch.tensor([[0.6, 0.3, 0.1]]))
    torch.testing.assert_close(half, torch.tensor([[0.36, 0.09, 0.01]]) / 0.46)
    certain, sure = (
        method.terms(
            torch.tensor([[30.0, 0, 0], [0, 30.0, 0], [0, 0, 30.0]]),
            torch.eye(3),
            torch.tensor([True, True, False]),
        ),
        method.terms(torch.zeros(3, 3), torch.eye(3), torch.tensor([True, False, False])),
    )
    assert [float(term) for term in certain] == pytest.approx([0, 0, 0], abs=1e-6)
    assert float(sure[0]) == pytest.approx(math.log(3))
    assert float(sure[1]) == pytest.approx(((2 / 3) ** 2 + 2 / 9) / 3)
    nobody = method.terms(torch.zeros(3, 3), torch.eye(3), torch.zeros(3, dtype=torch.bool))
    assert float(nobody[0]) == 0


def test_with_right_labels_only_and_no_blending_it_is_cross_entropy_and_the_prior():
    """w = 1: the refined label is the given one; alpha near 0: every share is near 1."""
    method, one = after(built(warmup=1, alpha=1e-3), 2), batch()
    method.clean.fill_(1.0)
    found = method(one)
    images, label = torch.cat(one.views), one.label.repeat(2)
    ce = sum(nn.functional.cross_entropy(n(images), label) for n in (method.network, method.other))
    assert float(found["labelled"]) == 1
    assert float(found["unlabelled_loss"]) == 0
    torch.testing.assert_close(2 * found["labelled_loss"], ce.detach(), rtol=0.02, atol=0)


def test_the_warm_up_is_cross_entropy_with_the_penalty():
    method, one = after(built(warmup=2, confidence_penalty=0.5), 1), batch()
    expected = 0.0
    for network in (method.network, method.other):
        p = network(one.views[0]).softmax(1)
        expected += nn.functional.cross_entropy(network(one.views[0]), one.label)
        expected += 0.5 * (p * p.log()).sum(1).mean()
    torch.testing.assert_close(method(one)["loss"], expected)
    assert not method.divided()
    assert after(method, 1).divided() is False
    assert after(method, 1).divided() is True


def test_the_weight_rises_and_a_short_training_shortens_warm_up_and_ramp():
    method, weights = built(epochs=9, unlabelled=6.0), []
    for _ in range(8):
        method.before_epoch(predict)
        weights.append(float(method.weight))
    assert weights == [0, 0, 0, 1, 3, 5, 6, 6]
    assert method.facts()["warmup"] == 3
    assert built(epochs=2).warmup == 1
    assert built(epochs=300).warmup == 10
    assert built(epochs=300).ramp == 16


def test_a_class_that_nobody_trusts_keeps_its_best():
    losses = np.array([0.1, 0.2, 0.3, 3.0, 2.0, 1.0] + [5.0 - 0.1 * i for i in range(20)])
    labels = np.array([0, 0, 0, 1, 1, 1] + [2] * 20)
    trusted, refilled = no_class_starved(losses < 0.25, losses, labels, 4)
    assert refilled == [1, 2]  # class 3 has no samples at all
    assert np.flatnonzero(trusted).tolist() == [0, 1, 5, 24, 25]
    trusted, refilled = no_class_starved(losses < 1.5, losses, labels, 4, least=0.4)
    assert refilled == [1, 2]
    assert np.flatnonzero(trusted).tolist() == [0, 1, 2, 4, 5, *range(18, 26)]


def test_an_emptied_class_is_filled_and_reported_and_the_step_stays_finite():
    def against_class_2(rows, module=None):
        return np.tile(two_populations(rows, rows[rows % K == 2]), 2)

    method = built(warmup=1)
    method.before_epoch(against_class_2)
    method.before_epoch(against_class_2)
    kept = (method.clean[:, :45] > 0.5).numpy()
    assert (
        kept[:, LABELS[:45] == 2].sum(1) == 5
    ).all()  # of 15: half of the two thirds kept overall, rounded up
    assert method.facts()["refilled"] == {"2": 2}
    method.clean.zero_()  # a batch without labelled samples, then one without others
    assert method(batch())["loss"].isfinite()
    method.clean.fill_(1)
    assert method(batch())["loss"].isfinite()


def test_losses_without_difference_keep_every_label():
    method = built(warmup=1)
    for _ in range(2):
        method.before_epoch(lambda rows, module=None: np.zeros((len(rows), 2 * K), np.float32))
    assert (method.clean[:, :45] == 1).all()
    assert float(method.rate) == 0


def test_the_prior_is_the_share_of_each_class():
    labels = np.where(np.arange(N) % 10 < 8, 0, 1 + np.arange(N) % 2)
    method = built(labels=labels)
    torch.testing.assert_close(method.prior, torch.tensor(np.bincount(labels[:45]) / 45).float())
    as_they_are = method.prior.log().repeat(6, 1)
    assert float(method.terms(as_they_are, torch.ones(6, 3) / 3, torch.ones(6, dtype=torch.bool))[2]) < 1e-6
    assert float(method.terms(torch.zeros(6, 3), torch.ones(6, 3) / 3, torch.ones(6).bool())[2]) > 0.1


def test_memories_follow_the_row_and_draws_hang_on_keys_alone():
    method = after(built(warmup=1), 2)
    share, partner = method.draw(batch().key, 0)
    torch.manual_seed(99)
    torch.testing.assert_close(method.draw(batch().key, 0), (share, partner))
    assert sorted(partner.tolist()) == list(range(2 * B))
    assert share.min() >= 0.5
    assert (method.draw(batch().key, 1)[0] != share).any()
    whole, turned = batch(), torch.randperm(B, generator=torch.Generator().manual_seed(1))
    other = Batch(
        views=tuple(view[turned] for view in whole.views), index=whole.index[turned], key=whole.key[turned],
        label=whole.label[turned],
    )  # fmt: skip
    for name in ("labelled", "agreement"):
        torch.testing.assert_close(method(whole)[name], method(other)[name])
    moved = batch(first=10)
    assert method(moved)["labelled"] != method(whole)["labelled"]


def test_a_checkpoint_holds_the_split_and_the_schedule():
    method = after(built(warmup=1), 2)
    again = built(warmup=1)
    again.load_state_dict(copy.deepcopy(method.state_dict()))
    torch.testing.assert_close(again(batch()), method(batch()))
    assert again.facts() == method.facts()
    assert again.classifier() is again.network


def test_gradients_reach_both_networks_under_autocast():
    """The plain pass without gradients must not leave weights in autocast's cache that have none."""
    method = after(built(warmup=1), 2)
    with torch.autocast("cpu", torch.bfloat16):
        terms = method(batch())
    terms["loss"].backward()
    assert terms["loss"].dtype == torch.float32
    for parameter in method.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1.0}, r"train\.dividemix\.threshold is 1\.0; it must be in \(0, 1\)"),
        ({"warmup": 0}, r"train\.dividemix\.warmup is 0; it must be at least 1"),
        ({"temperature": 0.0}, r"train\.dividemix\.temperature is 0\.0"),
        ({"unlabelled": -1.0}, r"train\.dividemix\.unlabelled is -1\.0"),
    ],
)
def test_settings_outside_their_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        DivideMix.Config(**settings)
