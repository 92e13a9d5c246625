import json
import subprocess
import sys

import numpy as np
import pytest
from sklearn import metrics
from sklearn.calibration import calibration_curve

from noisyssl import evaluation
from noisyssl.errors import DataError, TrainingError
from noisyssl.evaluation import figures, gain, softmax

CLASSES = ("a", "b", "c", "d")
SCALARS = evaluation.SCALARS


def data(count=400, classes=4, seed=0, levels=3):
    """Coarse logits (many ties) of imbalanced classes in groups of unequal size."""
    generator = np.random.default_rng(seed)
    share = 1 / np.arange(1, classes + 1) ** 2
    labels = generator.choice(classes, count, p=share / share.sum())
    logits = generator.normal(size=(count, classes)) + 1.2 * np.eye(classes)[labels]
    groups = generator.geometric(0.08, count)
    return np.round(logits * levels) / levels, labels, groups


def naive_calibration_error(probabilities, labels):
    total = 0.0
    for i in range(15):
        inside = [
            j
            for j, row in enumerate(probabilities)
            if i / 15 < max(row) <= (i + 1) / 15 or (i == 14 and max(row) >= 1)
        ]
        if inside:
            accuracy = sum(probabilities[j].argmax() == labels[j] for j in inside) / len(inside)
            confidence = sum(probabilities[j].max() for j in inside) / len(inside)
            total += len(inside) / len(labels) * abs(accuracy - confidence)
    return total


def oracle(logits, labels, classes=4):
    """Every figure by scikit-learn, over the classes present."""
    probabilities, predicted = softmax(logits), logits.argmax(1)
    present = [k for k in range(classes) if (labels == k).any()]
    areas = [metrics.roc_auc_score(labels == k, probabilities[:, k]) for k in present if (labels != k).any()]
    out = {
        "accuracy": metrics.accuracy_score(labels, predicted),
        "balanced_accuracy": np.mean(metrics.recall_score(labels, predicted, labels=present, average=None)),
        "macro_f1": metrics.f1_score(labels, predicted, labels=present, average="macro"),
        "macro_auroc": np.mean(areas) if areas else np.nan,
        "calibration_error": naive_calibration_error(probabilities, labels),
    }
    for k in range(classes):
        out[f"sensitivity {k}"] = (
            ((predicted == k) & (labels == k)).sum() / n if (n := (labels == k).sum()) else np.nan
        )
        out[f"specificity {k}"] = (
            ((predicted != k) & (labels != k)).sum() / n if (n := (labels != k).sum()) else np.nan
        )
    return out


def flat(found, field="value"):
    out = {name: getattr(getattr(found, name), field) for name in SCALARS}
    for table in ("sensitivity", "specificity"):
        for k, interval in enumerate(getattr(found, table).values()):
            out[f"{table} {k}"] = getattr(interval, field)
    return out


@pytest.mark.parametrize("seed", range(5))
def test_every_figure_is_scikit_learns(seed):
    logits, labels, groups = data(seed=seed)
    found = figures(logits, labels, groups, CLASSES, resamples=2)
    assert flat(found) == pytest.approx(oracle(logits, labels), rel=1e-12)
    matrix = metrics.confusion_matrix(labels, logits.argmax(1))
    np.testing.assert_array_equal(found.confusion, matrix)
    assert found.macro_auroc.value == pytest.approx(
        metrics.roc_auc_score(labels, softmax(logits), multi_class="ovr"), rel=1e-12
    )
    assert found.balanced_accuracy.value == pytest.approx(
        metrics.balanced_accuracy_score(labels, logits.argmax(1)), rel=1e-12
    )
    assert (found.n, found.groups) == (400, len(set(groups)))


def test_reliability_is_scikit_learns_calibration_curve():
    logits, labels, groups = data()
    found = figures(logits, labels, groups, CLASSES, resamples=2)
    confidence = softmax(logits).max(1)
    accuracy, mean = calibration_curve(logits.argmax(1) == labels, confidence, n_bins=15, strategy="uniform")
    filled = [one for one in found.reliability if one.count]
    assert len(found.reliability) == 15
    np.testing.assert_allclose([one.confidence for one in filled], mean)
    np.testing.assert_allclose([one.accuracy for one in filled], accuracy)
    gap = sum(one.count * abs(one.accuracy - one.confidence) for one in filled) / found.n
    assert gap == pytest.approx(found.calibration_error.value)
    assert sum(one.count for one in filled) == found.n


def test_a_confidence_on_an_edge_belongs_to_the_lower_bin():
    found = figures(np.zeros((4, 3)), np.array([0, 1, 2, 0]), range(4), "abc", resamples=2)
    assert [one.count for one in found.reliability] == [0] * 4 + [4] + [0] * 10  # 1/3 is 5/15


def test_intervals_are_percentiles_over_physically_repeated_groups():
    logits, labels, groups = data(count=120, seed=3)
    names = np.unique(groups)
    drawn = np.random.default_rng(7).integers(len(names), size=(60, len(names)))
    repeats = []
    for draw in drawn:
        rows = np.concatenate([np.flatnonzero(groups == names[g]) for g in draw])
        repeats.append(oracle(logits[rows], labels[rows]))
    found = figures(logits, labels, groups, CLASSES, resamples=60, seed=7)
    for name in repeats[0]:
        column = np.array([one[name] for one in repeats])
        low, high = np.nanpercentile(column, (2.5, 97.5))
        assert flat(found, "low")[name] == pytest.approx(low, rel=1e-9), name
        assert flat(found, "high")[name] == pytest.approx(high, rel=1e-9), name


def test_several_epochs_are_averaged_and_resampled_together():
    logits, labels, groups = data()
    one = figures(logits, labels, groups, CLASSES, resamples=100)
    same = figures(np.stack([logits] * 5), labels, groups, CLASSES, resamples=100)
    for field in ("value", "low", "high"):  # were the epochs resampled apart, the interval would shrink
        assert flat(same, field) == pytest.approx(flat(one, field), rel=1e-12)
    np.testing.assert_allclose(same.confusion, one.confusion)
    other = np.random.default_rng(1).normal(size=logits.shape)
    both = flat(figures(np.stack([logits, other]), labels, groups, CLASSES, resamples=2))
    second = flat(figures(other, labels, groups, CLASSES, resamples=2))
    assert both == pytest.approx({name: (flat(one)[name] + second[name]) / 2 for name in both})


def test_a_gain_is_the_difference_on_the_same_resamples():
    rng = np.random.default_rng(0)
    labels, groups = rng.integers(0, 3, 200), rng.integers(0, 40, 200)
    base = rng.normal(size=(2, 200, 3))
    better = base[0] + 0.3 * np.eye(3)[labels]
    found = gain(better, base, labels, groups, resamples=300, seed=5)
    one, other = (
        figures(x, labels, groups, "abc", resamples=300, seed=5).balanced_accuracy for x in (better, base)
    )
    assert found.value == pytest.approx(one.value - other.value, abs=1e-12)
    drawn = np.random.default_rng(5).integers(40, size=(300, 40))
    differences = []
    for groups_drawn in drawn:  # each resample written out, sample by sample
        rows = np.concatenate([np.flatnonzero(groups == g) for g in groups_drawn])

        def balanced(logits, rows=rows):
            hit = logits[rows].argmax(1) == labels[rows]
            return np.mean([hit[labels[rows] == k].mean() for k in np.unique(labels[rows])])

        differences.append(balanced(better) - np.mean([balanced(x) for x in base]))
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(differences, (2.5, 97.5))))
    same = gain(better, better, labels, groups, resamples=50)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_order_of_samples_names_of_groups_and_chunks_change_nothing(monkeypatch):
    logits, labels, groups = data()
    expected = flat(figures(logits, labels, groups, CLASSES, resamples=50), "low")
    order = np.random.default_rng(2).permutation(len(labels))
    shuffled = figures(logits[order], labels[order], groups[order], CLASSES, resamples=50)
    assert flat(shuffled, "low") == pytest.approx(expected)
    named = figures(logits, labels, [f"slide {g:03}" for g in groups], CLASSES, resamples=50)
    assert flat(named, "low") == pytest.approx(expected)
    monkeypatch.setattr(evaluation, "CHUNK", 7 * len(labels))
    assert flat(figures(logits, labels, groups, CLASSES, resamples=50), "low") == pytest.approx(expected)


def test_intervals_over_groups_cover_the_truth_where_those_over_samples_do_not():
    generator = np.random.default_rng(0)
    runs, covered, too_narrow = 150, 0, 0
    for _ in range(runs):
        groups = np.repeat(np.arange(50), 8)
        ability = generator.beta(3, 1, 50)[groups]  # mean 0.75: samples of a group share their fate
        labels = generator.integers(0, 2, 400)
        predicted = np.where(generator.random(400) < ability, labels, 1 - labels)
        logits = np.eye(2)[predicted]
        grouped = figures(logits, labels, groups, "ab", resamples=100).accuracy
        single = figures(logits, labels, np.arange(400), "ab", resamples=100).accuracy
        covered += grouped.low <= 0.75 <= grouped.high
        too_narrow += single.low <= 0.75 <= single.high
    assert 0.89 <= covered / runs <= 0.985
    assert too_narrow < covered - 10


def test_absent_classes_are_left_out_of_the_means():
    logits, labels, groups = data()
    kept = labels < 2
    found = figures(logits[kept], labels[kept], groups[kept], CLASSES, resamples=20)
    assert flat(found) == pytest.approx(oracle(logits[kept], labels[kept]), nan_ok=True)
    assert np.isnan(found.sensitivity["d"].value)
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert plain["sensitivity"]["d"] == {"value": None, "low": None, "high": None}
    assert plain["accuracy"]["low"] <= plain["accuracy"]["value"] <= plain["accuracy"]["high"]
    assert set(plain) == {*SCALARS, "sensitivity", "specificity", "n", "groups", "confusion", "reliability"}


def test_one_class_and_one_group_still_have_what_is_defined():
    found = figures(np.eye(2)[[0, 0, 1]], np.zeros(3, int), ["x"] * 3, "ab", resamples=5)
    assert found.accuracy.value == pytest.approx(2 / 3)
    assert np.isnan(found.accuracy.low)
    assert np.isnan(found.macro_auroc.value)
    assert np.isnan(found.specificity["a"].value)


def test_softmax_is_stable_and_exact():
    np.testing.assert_allclose(softmax(np.array([1000.0, 1000.0, -1e4])), [0.5, 0.5, 0])
    np.testing.assert_allclose(softmax(np.log([[1.0, 2, 5]])), [[0.125, 0.25, 0.625]])
    assert softmax(np.zeros((2, 3), np.float16)).dtype == np.float64


def test_bad_input_says_what_to_do():
    logits, labels, groups = data(count=30)
    labels[[4, 9]] = -1
    with pytest.raises(DataError, match=r"2 of 30 labels are unknown, first: -1 in row 4; .* Leave samples"):
        figures(logits, labels, groups, CLASSES)
    with pytest.raises(DataError, match="0 samples"):
        figures(logits[:0], labels[:0], groups[:0], CLASSES)
    logits[3, 1] = np.inf
    with pytest.raises(TrainingError, match="logits of 1 of 30 samples are not finite"):
        figures(logits, np.zeros(30, int), groups, CLASSES)


def test_serving_needs_numpy_only():
    blocked = "sys.modules['torch'] = sys.modules['sklearn'] = sys.modules['scipy'] = None"
    modules = ", ".join(f"noisyssl.{name}" for name in ("evaluation", "noise", "baselines", "philox"))
    code = f"import sys; {blocked}; import {modules}"
    subprocess.run([sys.executable, "-c", code], check=True)
