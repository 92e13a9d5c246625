"""Frozen features against brute force, scikit-learn and spectra that are known."""

import math

import numpy as np
import pytest
from sklearn.metrics import log_loss
from sklearn.neighbors import KNeighborsClassifier

from noisyssl import probe
from noisyssl.errors import ConfigError
from noisyssl.evaluation import softmax


def features(rows: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def labelled(seed: int = 0, shift: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """200 rows of three overlapping classes."""
    labels = np.random.default_rng(seed).integers(3, size=200)
    centres = features(3, 8, seed=99) * shift
    return features(200, 8, seed) + centres[labels], labels


def test_neighbours_are_those_of_a_loop():
    queries, bank = features(7, 5), features(30, 5, seed=1)
    near, cosine = probe.neighbours(queries, bank, 4)
    for i, query in enumerate(queries):
        found = [float(query @ row / np.linalg.norm(query) / np.linalg.norm(row)) for row in bank]
        order = sorted(range(len(bank)), key=lambda j: -found[j])[:4]
        assert near[i].tolist() == order
        np.testing.assert_allclose(cosine[i], [found[j] for j in order], rtol=1e-5)


def test_neighbours_do_not_depend_on_how_many_are_computed_at_once(monkeypatch):
    queries, bank = features(20, 5), features(30, 5, seed=1)
    whole = probe.neighbours(queries, bank, 3)
    monkeypatch.setattr(probe, "CELLS", 90)
    parts = probe.neighbours(queries, bank, 3)
    np.testing.assert_array_equal(whole[0], parts[0])


def test_knn_is_the_weighted_vote_of_the_paper():
    """Wu et al., section 3.4: a class scores the sum of exp(cosine / 0.07) over its neighbours."""
    train, labels = labelled()
    test, _ = labelled(seed=1)
    scores = softmax(probe.knn(train, labels, test, 3, k=20))
    for i in range(len(test)):
        cosine = [float(test[i] @ row / np.linalg.norm(test[i]) / np.linalg.norm(row)) for row in train]
        votes = [0.0, 0.0, 0.0]
        for j in sorted(range(len(train)), key=lambda j: -cosine[j])[:20]:
            votes[labels[j]] += math.exp(cosine[j] / 0.07)
        np.testing.assert_allclose(scores[i], np.array(votes) / sum(votes), rtol=1e-4, atol=1e-12)


def test_equal_votes_are_scikit_learns():
    train, labels = labelled()
    test, _ = labelled(seed=1)
    ours = softmax(probe.knn(train, labels, test, 3, k=7, temperature=math.inf))
    peer = KNeighborsClassifier(7, metric="cosine", algorithm="brute").fit(train, labels)
    np.testing.assert_allclose(ours, peer.predict_proba(test), atol=1e-12)


def test_rows_without_a_label_have_no_vote():
    train, labels = labelled()
    test, _ = labelled(seed=1)
    unknown = np.arange(len(train)) % 3 == 0
    expected = probe.knn(train[~unknown], labels[~unknown], test, 3, k=5)
    np.testing.assert_array_equal(probe.knn(train, np.where(unknown, -1, labels), test, 3, k=5), expected)


@pytest.mark.parametrize("k", [0, 31])
def test_more_neighbours_than_rows_are_refused(k):
    with pytest.raises(ConfigError, match=rf"k is {k}; it must lie in 1-30"):
        probe.neighbours(features(2, 5), features(30, 5), k)


@pytest.mark.parametrize("read", ["knn", "linear"])
@pytest.mark.parametrize(("shift", "low", "high"), [(20.0, 1.0, 1.0), (0.0, 0.2, 0.5)])
def test_separable_features_are_read_perfectly_and_noise_at_chance(read, shift, low, high):
    train, labels = labelled(shift=shift)
    test, truth = labelled(seed=1, shift=shift)
    if read == "knn":
        scores = probe.knn(train, labels, test, 3)
    else:
        scores, _ = probe.linear(train, labels, np.arange(200), test, 3)
    assert low <= (scores.argmax(axis=1) == truth).mean() <= high


def test_the_penalty_is_the_best_on_groups_held_out_whole():
    """C minimises the log loss of a fifth of the groups after fitting the others; refitted on all rows."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    train, labels = labelled(shift=0.5)
    test, _ = labelled(seed=1)
    groups = np.arange(200) // 4
    held = probe.held_out(groups, labels)
    assert held.sum() == 40
    assert not set(groups[held]) & set(groups[~held])

    def fitted(rows: np.ndarray, answers: np.ndarray, others: np.ndarray, strength: float) -> np.ndarray:
        scale = StandardScaler().fit(rows)
        model = LogisticRegression(C=strength, max_iter=1000).fit(scale.transform(rows), answers)
        return model.predict_proba(scale.transform(others))

    x = train.astype(np.float64)
    losses = {c: log_loss(labels[held], fitted(x[~held], labels[~held], x[held], c)) for c in probe.STRENGTHS}
    scores, strength = probe.linear(train, labels, groups, test, 3)
    assert strength == min(losses, key=losses.get)
    assert probe.STRENGTHS[0] < strength < probe.STRENGTHS[-1], "the data must make it choose"
    np.testing.assert_allclose(
        softmax(scores), fitted(x, labels, test.astype(np.float64), strength), rtol=1e-6
    )


def test_every_class_is_held_out_and_kept_though_each_group_has_one_class():
    labels = np.repeat([0, 1, 2], [10, 50, 140])
    held = probe.held_out(np.arange(200) // 2, labels)
    assert set(labels[held]) == set(labels[~held]) == {0, 1, 2}
    few = probe.held_out(np.array(["a", "b"] * 100), labels)
    assert few.sum() == 40


def test_effective_rank_of_known_spectra():
    assert probe.effective_rank(np.eye(8)) == pytest.approx(8)
    assert probe.effective_rank(np.outer(np.arange(1, 9), np.ones(5))) == pytest.approx(1, abs=1e-5)
    assert probe.effective_rank(np.zeros((4, 3))) == 0
    spectrum = np.array([4.0, 2.0, 1.0, 1.0])
    left, _ = np.linalg.qr(features(20, 4).astype(float))
    right, _ = np.linalg.qr(features(4, 4, seed=1).astype(float))
    # shares 1/2, 1/4, 1/8, 1/8: entropy 7/4 bits
    assert probe.effective_rank(left @ np.diag(spectrum) @ right) == pytest.approx(2**1.75)
    assert probe.effective_rank((left @ np.diag(spectrum) @ right).T) == pytest.approx(2**1.75)


def test_spread_of_features_that_point_everywhere_is_one_over_root_d():
    """SimSiam, section 4.1: the standard deviation of normalised isotropic features is 1 / sqrt(D)."""
    spread = probe.spread(features(4000, 32) * 7)
    assert spread.full_std == pytest.approx(32**-0.5)
    assert spread.std == pytest.approx(spread.full_std, rel=0.01)
    assert spread.effective_rank == pytest.approx(32, rel=0.01)


def test_rank_is_of_what_differs_between_images():
    """A large common offset is no direction in which images differ."""
    line = np.outer(np.linspace(-1, 1, 50), features(1, 16)[0])
    assert probe.spread(line + 1000).effective_rank == pytest.approx(1, abs=0.01)
    plane = features(300, 2) @ features(2, 16, seed=1)
    assert 1.5 < probe.spread(plane + 100).effective_rank < 2.1


@pytest.mark.parametrize(
    ("made", "collapsed"),
    [
        (features(300, 64), False),
        (np.maximum(features(300, 64), 0), False),  # as after ReLU: all cosines are positive
        (features(300, 64) + 2, False),  # mean cosine 0.8
        (np.ones((300, 64), np.float32), True),
        (np.zeros((300, 64), np.float32), True),
        (1 + 0.001 * features(300, 64), True),
        (np.outer(np.linspace(1, 2, 300), features(1, 64)[0]) + features(1, 64, seed=1), True),  # a line
    ],
)
def test_collapse_fires_on_constant_features_and_not_on_random_ones(made, collapsed):
    assert probe.spread(made).is_collapsed() == collapsed


def test_the_map_is_seeded_and_keeps_clusters_together():
    labels = np.repeat([0, 1, 2], 20)
    made = features(3, 80, seed=3)[labels] * 5 + features(60, 80)
    points = probe.flat_map(made)
    assert points.shape == (60, 2)
    np.testing.assert_array_equal(points, probe.flat_map(made))
    distance = np.linalg.norm(points[:, None] - points[None], axis=2) + np.where(np.eye(60), np.inf, 0)
    assert (labels[distance.argmin(axis=1)] == labels).mean() > 0.95


def test_no_map_of_few_or_equal_features():
    assert probe.flat_map(features(9, 5)).shape == (0, 2)
    assert probe.flat_map(np.ones((50, 5), np.float32)).shape == (0, 2)
