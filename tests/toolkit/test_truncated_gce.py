"""Truncated GCE: which samples are pruned, when, and what becomes of their loss."""

import math

import numpy as np
import pytest
import torch

from noisyssl.errors import ConfigError
from noisyssl.losses.gce import GeneralizedCrossEntropy
from noisyssl.objective import Given

N, K = 40, 4
LABELS = np.arange(N) % K


def built(epochs=None, **settings):
    given = Given(count=N, train=np.arange(30), classes=K, labels=LABELS, epochs=epochs)
    return GeneralizedCrossEntropy(GeneralizedCrossEntropy.Config(**settings), given)


def says(p_of_label):
    """A network that gives each row's label this probability, and the rest to the next class."""

    def predict(rows, module=None):
        p = np.full((len(rows), K), 1e-9)
        p[np.arange(len(rows)), LABELS[rows]] = p_of_label[rows]
        p[np.arange(len(rows)), (LABELS[rows] + 1) % K] = 1 - p_of_label[rows]
        return np.log(p).astype(np.float32)

    return predict


def test_it_is_the_papers_loop():
    p_of_label = np.linspace(0.02, 0.98, N)
    loss = built(truncate=0.5, start=1)
    for _ in range(2):
        loss.before_epoch(says(p_of_label))
    assert np.array_equal(loss.kept[:30].numpy() == 1, p_of_label[:30] >= 0.5)
    generator = torch.Generator().manual_seed(0)
    logits, index = 3 * torch.randn(12, K, generator=generator), torch.arange(14, 26)
    label, total = torch.from_numpy(LABELS)[index], 0.0
    for row, y, i in zip(logits.softmax(1).double().tolist(), label.tolist(), index.tolist(), strict=True):
        weight = 1 if p_of_label[i] >= 0.5 else 0
        total += weight * (1 - row[y] ** 0.7) / 0.7 + (1 - weight) * (1 - 0.5**0.7) / 0.7
    assert loss(logits, label, index).item() == pytest.approx(total / 12, rel=1e-5)
    logits.requires_grad_()
    loss(logits, label, index).backward()
    pruned = torch.from_numpy(p_of_label)[index] < 0.5
    assert 0 < pruned.sum() < 12
    assert not logits.grad[pruned].any()
    assert logits.grad[~pruned].any(1).all()
    assert loss.facts() == {"pruned": pytest.approx(np.mean(p_of_label[:30] < 0.5)), "refilled": {}}


def test_it_prunes_on_schedule_and_samples_may_come_back():
    loss, shares = built(truncate=0.5, start=2, every=3), []
    for epoch in range(9):
        loss.before_epoch(says(np.full(N, 0.9) if epoch >= 4 else np.where(np.arange(N) < 6, 0.1, 0.9)))
        shares.append(round(30 * loss.facts()["pruned"]))
    assert shares == [0, 0, 6, 6, 6, 0, 0, 0, 0]
    assert built(epochs=30).start == 10
    assert built(epochs=300).start == 40


def test_before_the_first_pruning_its_gradient_is_that_of_gce():
    plain, truncated = built(), built(truncate=0.5)
    logits = torch.randn(12, K, generator=torch.Generator().manual_seed(0))
    label, index = torch.from_numpy(LABELS)[:12], torch.arange(12)
    torch.testing.assert_close(truncated(logits, label, index), plain(logits, label, index))
    assert plain.state_dict() == {}  # nothing remembered, nothing in a checkpoint
    assert plain.facts() == {}
    plain.before_epoch(None)


def test_a_class_that_is_pruned_whole_keeps_its_best_and_that_is_a_fact():
    p_of_label = np.where(LABELS == 1, 0.1 + np.arange(N) / 1000, 0.9)
    loss = built(truncate=0.5, start=1)
    for _ in range(2):
        loss.before_epoch(says(p_of_label))
    rows = np.flatnonzero(LABELS[:30] == 1)
    assert rows[loss.kept[rows].numpy() == 1].tolist() == [rows[-1]]  # one of eight: a tenth, rounded up
    assert loss.facts()["refilled"] == {"1": 1}


def test_a_threshold_of_one_is_refused():
    with pytest.raises(ConfigError, match=r"train\.gce\.truncate is 1\.0; it must be in \[0, 1\)"):
        built(truncate=1.0)


def test_the_constant_is_the_loss_at_the_threshold():
    loss = built(truncate=0.3)
    loss.kept.zero_()
    logits = torch.zeros(1, K)
    gce = (1 - math.exp(0.7 * math.log(0.3))) / 0.7
    assert loss(logits, torch.tensor([0]), torch.tensor([3])).item() == pytest.approx(gce)
