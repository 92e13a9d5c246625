"""Paired gains: their value by hand, and intervals that cover what they should."""

import numpy as np
import pytest

from noisyssl.evaluation import figures, gain
from noisyssl.gains import balanced_accuracies, paired_gain


def scores(labels: np.ndarray, share: float, classes: int, seed: int) -> np.ndarray:
    """Logits that are right on about `share` of the rows."""
    generator = np.random.default_rng(seed)
    wrong = generator.random(len(labels)) >= share
    answers = np.where(
        wrong, (labels + 1 + generator.integers(classes - 1, size=len(labels))) % classes, labels
    )
    return np.eye(classes)[answers] * 5.0


@pytest.fixture
def labels() -> np.ndarray:
    return np.random.default_rng(1).integers(3, size=300)


def test_balanced_accuracy_is_that_of_the_figures(labels):
    logits = np.stack([scores(labels, 0.7, 3, seed) for seed in range(4)])
    group = np.arange(300) % 50
    found = balanced_accuracies(logits, labels, group, np.ones((1, 50)))[0]
    assert found == pytest.approx(
        figures(logits, labels, group, ["a", "b", "c"], resamples=0).balanced_accuracy.value
    )


def test_with_one_seed_it_is_the_paired_gain_over_groups(labels):
    ours, theirs = scores(labels, 0.8, 3, 0), scores(labels, 0.6, 3, 1)
    groups = np.arange(300) % 60
    mine, known = paired_gain([ours], [theirs], labels, groups), gain(ours, theirs, labels, groups)
    assert mine.value == pytest.approx(known.value)
    assert mine.low == pytest.approx(known.low, abs=0.015)
    assert mine.high == pytest.approx(known.high, abs=0.015)


def test_swapping_the_sides_changes_the_sign(labels):
    sides = [scores(labels, share, 3, seed) for seed, share in enumerate((0.8, 0.6))]
    groups = np.arange(300)
    there, back = (paired_gain([a], [b], labels, groups) for a, b in (sides, sides[::-1]))
    assert there.value == pytest.approx(-back.value)
    assert there.low == pytest.approx(-back.high)


def test_what_both_sides_share_does_not_widen_the_interval(labels):
    logits = scores(labels, 0.7, 3, 0)
    found = paired_gain([logits, logits], [logits, logits], labels, np.arange(300))
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_seeds_that_disagree_widen_it(labels):
    good, bad, base = (scores(labels, share, 3, 0) for share in (0.9, 0.5, 0.7))
    groups = np.arange(300)
    alike = paired_gain([good, good], [base, base], labels, groups)
    torn = paired_gain([good, bad], [base, base], labels, groups)
    assert alike.low > 0.1
    assert torn.low < -0.1 < 0.1 < torn.high


def test_the_interval_covers_the_true_gain_about_95_times_in_100():
    generator, covered = np.random.default_rng(5), 0
    for trial in range(60):
        labels = generator.integers(2, size=400)
        ours, theirs = scores(labels, 0.8, 2, 2 * trial), scores(labels, 0.7, 2, 2 * trial + 1)
        found = paired_gain([ours], [theirs], labels, np.arange(400), resamples=400)
        covered += found.low <= 0.1 <= found.high
    assert 50 <= covered <= 60


def test_a_single_group_has_no_interval(labels):
    found = paired_gain([scores(labels, 0.8, 3, 0)], [scores(labels, 0.6, 3, 1)], labels, ["one"] * 300)
    assert found.value > 0.1
    assert np.isnan(found.low)
    assert np.isnan(found.high)
