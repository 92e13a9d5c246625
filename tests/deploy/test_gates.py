import re

import numpy as np
import pytest

from noisyssl.deploy.gates import Gates, compare, fp16_faults, int8_faults

REFERENCE = np.log([[0.6, 0.4], [0.502, 0.498], [0.3, 0.7], [0.1, 0.9]])


def softmax(logits):
    powers = np.exp(logits)
    return powers / powers.sum(1, keepdims=True)


def compared(logits, labels=None, margin=0.01):
    return compare(REFERENCE, logits, softmax(logits), labels, margin)


def test_changes_are_counted_and_those_within_the_margin_are_not():
    found = compared(np.log([[0.4, 0.6], [0.49, 0.51], [0.3, 0.7], [0.1, 0.9]]))
    assert (found["n"], found["top1_changes"], found["top1_changes_beyond_margin"]) == (4, 2, 1)
    assert found["agreement"] == 0.5
    assert found["max_probability_difference"] == pytest.approx(0.2)
    assert found["macro_auroc"] is None


def test_accuracies_are_of_the_labelled_images():
    found = compared(REFERENCE, np.array([0, 1, 1, -1]))
    assert found["balanced_accuracy"] == 0.75  # of class 0 its only one, of class 1 one of two
    assert found["macro_auroc"] == 1.0
    assert found["calibration_error"] == pytest.approx((0.4 + 0.502 + 0.3) / 3)


@pytest.mark.parametrize(
    ("n", "flips", "passes"),
    [(37, 1, True), (37, 2, False), (1000, 1, True), (5000, 5, True), (5000, 6, False)],
)
def test_fp16_may_change_one_in_a_thousand_and_always_one(n, flips, passes):
    found = {
        "n": n, "top1_changes_beyond_margin": flips, "max_probability_difference": 0.01,
        "largest_activation": 16384.0,
    }  # fmt: skip
    assert (not fp16_faults(found, Gates())) == passes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_probability_difference": 0.011}, "a probability differs by 0.011, at most 0.01"),
        ({"largest_activation": 16385.0}, r"an activation in FP16 reaches 1.*, at most 16384"),
    ],
)
def test_fp16_has_limits_of_difference_and_range(change, words):
    found = {
        "n": 9, "top1_changes_beyond_margin": 0, "max_probability_difference": 0.0, "largest_activation": 1.0
    }  # fmt: skip
    assert not fp16_faults(found, Gates())
    (fault,) = fp16_faults(found | change, Gates())
    assert re.search(words, fault)


@pytest.mark.parametrize(
    ("agreement", "before", "after", "words"),
    [
        (0.99, 0.9, 0.8981, None),
        (0.99, 0.9, 0.95, None),
        (0.9899, 0.9, 0.9, "98.99 % of 100 images keep their top-1 class, at least 99 % must"),
        (1.0, 0.9, 0.8979, "macro-AUROC falls by 0.0021 to 0.8979, at most 0.002"),
        (1.0, None, 0.9, "macro-AUROC is undefined"),
    ],
)
def test_int8_must_agree_and_keep_its_auroc(agreement, before, after, words):
    found = {"n": 100, "agreement": agreement, "macro_auroc": after}
    faults = int8_faults(found, {"macro_auroc": before}, Gates())
    assert [fault for fault in faults if words is None or words not in fault] == []
    assert bool(faults) == bool(words)
    assert not int8_faults(found, {"macro_auroc": before}, Gates(int8_agreement=0, int8_auroc_drop=1))
