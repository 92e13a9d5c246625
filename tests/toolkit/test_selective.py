"""Temperature and selective prediction against answers that are known, and against other optimisers."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from noisyssl.errors import DataError
from noisyssl.evaluation import softmax
from noisyssl.selective import fit_temperature, log_likelihood, selection, warning


def drawn(count: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are `temperature` times too large for labels drawn from their own probabilities."""
    generator = np.random.default_rng(seed)
    true = generator.normal(size=(count, 4)) * 2
    shares = softmax(true)
    labels = (shares.cumsum(axis=1) > generator.random((count, 1))).argmax(axis=1)
    return true * temperature, labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_spoilt_the_logits_is_found(temperature):
    logits, labels = drawn(20_000, temperature)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.05)


def test_it_is_the_optimum_that_scipy_finds():
    logits, labels = drawn(300, 2.0, seed=3)
    found = minimize_scalar(
        lambda t: -log_likelihood(logits, labels, t),
        bounds=(0.05, 20),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert fit_temperature(logits, labels) == pytest.approx(found.x, rel=1e-4)


def test_the_likelihood_is_that_of_softmax():
    logits, labels = drawn(50, 1.0)
    naive = np.mean([np.log(softmax(row / 2.5)[label]) for row, label in zip(logits, labels, strict=True)])
    assert log_likelihood(logits, labels, 2.5) == pytest.approx(naive)


def test_wrong_labels_make_it_hotter_and_the_warning_says_so():
    logits, labels = drawn(20_000, 1.0)
    flipped = np.where(np.random.default_rng(1).random(len(labels)) < 0.3, (labels + 1) % 4, labels)
    assert fit_temperature(logits, flipped) > 1.3
    assert "30 % are wrong" in warning(0.3, "noisy")
    assert "that nobody checked" in warning(None, "noisy")
    assert warning(0.3, "clean") is None
    assert warning(0.0, "noisy") is None


def test_the_curve_equals_a_loop_over_thresholds():
    logits, labels = drawn(200, 1.0, seed=5)
    logits = np.round(logits, 1)  # some confidences tie
    found = selection(logits, labels)
    confidence = softmax(logits).max(axis=1)
    wrong = logits.argmax(axis=1) != labels
    assert list(found.threshold) == sorted(set(confidence), reverse=True)
    for threshold, coverage, risk in zip(found.threshold, found.coverage, found.risk, strict=True):
        answered = confidence >= threshold
        assert coverage == pytest.approx(answered.mean())
        assert risk == pytest.approx(wrong[answered].mean())
    assert found.coverage[-1] == 1


def test_the_threshold_keeps_the_wanted_accuracy_at_the_largest_coverage():
    logits, labels = drawn(2000, 1.0, seed=7)
    threshold, coverage, accuracy = selection(logits, labels).threshold_for(0.9)
    confidence, right = softmax(logits).max(axis=1), logits.argmax(axis=1) == labels
    answered = confidence >= threshold
    assert accuracy == pytest.approx(right[answered].mean())
    assert accuracy >= 0.9
    assert coverage == pytest.approx(answered.mean())
    for lower in np.unique(confidence[confidence < threshold])[-300:]:
        assert right[confidence >= lower].mean() < 0.9


def test_an_accuracy_out_of_reach_has_no_threshold():
    logits, labels = np.array([[3.0, 0], [2, 0], [1, 0]]), np.array([1, 1, 0])
    assert selection(logits, labels).threshold_for(0.9) is None


def test_the_area_is_0_where_all_is_right_and_1_where_all_is_wrong():
    logits = np.array([[3.0, 0], [2, 0], [1, 0]])
    assert selection(logits, np.zeros(3, int)).area() == 0
    assert selection(logits, np.ones(3, int)).area() == pytest.approx(1)
    assert selection(logits, np.array([0, 0, 1])).area() == pytest.approx((0 + 0 + 1 / 3) / 3)


def test_unlabelled_rows_do_not_count_and_none_at_all_is_an_error():
    logits, labels = drawn(100, 2.0)
    more = np.concatenate([logits, 9 * np.eye(4)]), np.concatenate([labels, [-1] * 4])
    assert fit_temperature(*more) == fit_temperature(logits, labels)
    for ask in (fit_temperature, selection):
        with pytest.raises(DataError, match="of 0 labelled samples"):
            ask(logits, np.full(100, -1))
