"""Confident learning against the authors' own cleanlab, on the same probabilities."""

import numpy as np
import pytest

from noisyssl import confident

cleanlab = pytest.importorskip("cleanlab", reason="the oracle of these tests")
from cleanlab import count, rank  # noqa: E402
from cleanlab.filter import find_label_issues  # noqa: E402


def problem(seed, n=3000, classes=5, rate=0.2, skill=2.0):
    """Given labels, truth and out-of-sample probabilities of an imperfect model."""
    rng = np.random.default_rng(seed)
    truth = rng.choice(classes, n, p=rng.dirichlet(np.full(classes, 5.0)))
    wrong = rng.random(n) < rate
    labels = np.where(wrong, (truth + rng.integers(1, classes, n)) % classes, truth)
    logits = (
        rng.standard_normal((n, classes)) + skill * np.eye(classes)[truth] + 0.5 * np.eye(classes)[labels]
    )
    p = np.exp(logits)
    return labels, truth, p / p.sum(1, keepdims=True)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("classes", [2, 3, 9])
def test_ranking_thresholds_and_joint_are_cleanlabs(seed, classes):
    labels, _, p = problem(seed, classes=classes)
    score = confident.suspicion(p, labels)
    np.testing.assert_allclose(1 - score, rank.get_label_quality_scores(labels, p), rtol=1e-6)
    np.testing.assert_allclose(
        confident.thresholds(p, labels), count.get_confident_thresholds(labels, p), rtol=1e-6
    )
    joint = confident.joint(p, labels)
    assert joint.sum() == pytest.approx(1)
    np.testing.assert_allclose(
        joint, count.estimate_joint(labels, p), atol=classes / len(labels)
    )  # it rounds counts
    _, theirs, _ = count.estimate_latent(count.compute_confident_joint(labels, p), labels)
    np.testing.assert_allclose(confident.transition(joint), theirs.T, atol=0.03)


@pytest.mark.parametrize("seed", range(3))
def test_flags_are_cleanlabs_confident_off_diagonals(seed):
    labels, _, p = problem(seed)
    theirs = find_label_issues(labels, p, filter_by="confident_learning")
    ours = confident.flagged(p, labels)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3])
def test_the_rate_is_near_the_truth_where_the_model_is_good(rate):
    labels, truth, p = problem(1, n=20_000, rate=rate, skill=6.0)
    assert confident.noise_rate(confident.joint(p, labels)) == pytest.approx(
        (labels != truth).mean(), abs=0.03
    )


def test_weights_are_copies_of_rows():
    labels, _, p = problem(2, n=200)
    weights = np.random.default_rng(0).integers(1, 4, 200)
    doubled = np.repeat(np.arange(200), weights)
    np.testing.assert_allclose(
        confident.joint(p, labels, weights.astype(float)), confident.joint(p[doubled], labels[doubled])
    )


def test_a_class_that_nobody_is_given_stays_out():
    labels, _, p = problem(0, classes=3, n=500)
    labels = np.where(labels == 2, 0, labels)
    joint = confident.joint(p, labels)
    assert (joint[2] == 0).all()
    assert (joint[:, 2] == 0).all()
    np.testing.assert_array_equal(confident.transition(joint)[2], [0, 0, 1])
    assert np.isfinite(joint).all()
