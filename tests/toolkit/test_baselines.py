import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from noisyssl.baselines import colour_histogram, fit_predict, mean_rgb


def image(seed=0, height=13, width=7):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_mean_rgb_is_the_mean_of_each_channel():
    pixels = image()
    expected = [sum(float(v) for v in pixels[:, :, c].ravel()) / (13 * 7) / 255 for c in range(3)]
    assert mean_rgb(pixels) == pytest.approx(expected)


def test_colour_histogram_is_numpys_joint_histogram():
    pixels = image()
    edges = [np.arange(0, 257, 32)] * 3
    expected, _ = np.histogramdd(pixels.reshape(-1, 3), bins=edges)
    np.testing.assert_allclose(colour_histogram(pixels), expected.ravel() / (13 * 7))
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    assert colour_histogram(red)[7 * 64] == 1


def data(classes=3, count=300):
    generator = np.random.default_rng(0)
    labels = generator.integers(0, classes, count)
    scale = np.array([1.0, 100.0, 0.01])  # only standardised features are comparable
    return (generator.normal(size=(count, 3)) + np.eye(3)[labels] * 3) * scale, labels


def test_log_probabilities_are_those_of_standardised_logistic_regression():
    features, labels = data()
    out = fit_predict(features[:200], labels[:200], features[200:], 3)
    mean, std = features[:200].mean(0), features[:200].std(0)
    model = LogisticRegression(max_iter=1000).fit((features[:200] - mean) / std, labels[:200])
    expected = model.predict_log_proba((features[200:] - mean) / std)
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(np.exp(out).sum(axis=1), 1)
    assert (out.argmax(1) == labels[200:]).mean() > 0.8
    np.testing.assert_array_equal(out, fit_predict(features[:200], labels[:200], features[200:], 3))


def test_classes_absent_from_training_are_finite_and_never_chosen():
    features, labels = data()
    out = fit_predict(features, np.where(labels == 1, -1, labels), features, 5)  # -1 rows are left out
    assert out.shape == (300, 5)
    assert np.isfinite(out).all()
    assert set(out.argmax(1)) == {0, 2}
    assert (out[:, [1, 3, 4]] == -100).all()
    only = fit_predict(features, np.zeros(300, int), features, 2)
    np.testing.assert_array_equal(only, [[0.0, -100.0]] * 300)
