"""Xia et al.'s noise: the asked mean rate, each image its own, and no class that takes everything."""

import numpy as np
import pytest
from scipy.stats import truncnorm

from noisyssl.instance_noise import DEVIATION, flip_rates, shares
from noisyssl.noise import inject_each, realised

N, C = 4000, 5
RNG = np.random.default_rng(0)
LABELS = RNG.choice(C, N, p=(0.4, 0.3, 0.15, 0.1, 0.05))
FEATURES = RNG.standard_normal((N, 30)) * RNG.uniform(0.1, 200, 30) + 50
ROWS = np.arange(N)


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3, 0.5])
def test_the_mean_rate_is_the_asked_one_though_the_distribution_is_cut(rate):
    rates = flip_rates(np.arange(200_000), rate, seed=4)
    assert rates.mean() == pytest.approx(rate, abs=3 * DEVIATION / np.sqrt(200_000))
    assert 0 <= rates.min() < rates.max() <= 1
    if rate == 0.5:  # hardly cut: the normal distribution itself
        assert rates.std() == pytest.approx(DEVIATION, rel=0.02)
    assert (flip_rates(np.arange(9), 0.0, seed=0) == 0).all()


def test_shares_are_the_papers_formula():
    """Row by row: q softmax(x W_y) over the other classes, W_y drawn in the order of the classes."""
    found = shares(FEATURES, LABELS, ROWS, C, 0.3, seed=7)
    generator = np.random.Generator(np.random.Philox(key=7))
    projections = [generator.standard_normal((30, C)) / np.sqrt(30) for _ in range(C)]
    x = (FEATURES - FEATURES.mean(0)) / FEATURES.std(0)
    flip = flip_rates(ROWS, 0.3, 7)
    for i in (0, 17, 3999):
        own = LABELS[i]
        scores = {j: float(x[i] @ projections[own][:, j]) for j in range(C) if j != own}
        total = sum(np.exp(score) for score in scores.values())
        for j, score in scores.items():
            assert found[i, j] == pytest.approx(flip[i] * np.exp(score) / total)
        assert found[i, own] == pytest.approx(1 - flip[i])
    np.testing.assert_allclose(found.sum(1), 1)


def test_over_100_seeds_the_rate_is_the_asked_one_within_three_standard_errors():
    rates = []
    for seed in range(100):
        given = inject_each(LABELS, shares(FEATURES, LABELS, ROWS, C, 0.3, seed), seed, ROWS)
        done = realised(LABELS, given, C)
        rates.append(done.rate)
        np.testing.assert_allclose(done.matrix.sum(1), 1)
    error = np.sqrt(0.3 * 0.7 / N)
    assert (np.abs(np.array(rates) - 0.3) < 3 * error).mean() > 0.97
    assert abs(np.mean(rates) - 0.3) < 3 * error / 10


def test_it_depends_on_the_image_and_does_not_saturate():
    found = shares(FEATURES * 1e4, LABELS, ROWS, C, 0.3, seed=1)
    others = np.where(np.eye(C, dtype=bool)[LABELS], 0, found)
    most = others.max(1) / others.sum(1)
    assert 0.35 < np.median(most) < 0.8  # raw scores of this size would give one class all
    assert most.std() > 0.05
    favourite = others[LABELS == 0].argmax(1)
    assert np.bincount(favourite, minlength=C)[1:].min() > 0.05 * len(favourite)
    alike = shares(np.ones((N, 3)), LABELS, ROWS, C, 0.3, seed=1)  # no feature differs: every class alike
    np.testing.assert_allclose(alike[0][np.arange(C) != LABELS[0]], flip_rates(ROWS, 0.3, 1)[0] / (C - 1))


def test_the_cut_distribution_is_scipys():
    centre = 0.3
    cut = -centre / DEVIATION, (1 - centre) / DEVIATION
    sample = flip_rates(np.arange(100_000), float(truncnorm.mean(*cut, loc=centre, scale=DEVIATION)), 0)
    expected = truncnorm.ppf([0.1, 0.5, 0.9], *cut, loc=centre, scale=DEVIATION)
    np.testing.assert_allclose(np.quantile(sample, [0.1, 0.5, 0.9]), expected, atol=0.003)
