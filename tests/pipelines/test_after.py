"""What is fitted after training, on logits whose answers are known."""

import json

import numpy as np
import pytest

from noisyssl.errors import ConfigError, DataError
from noisyssl.pipelines import after

CLEAN, NOISY = {"val_labels": "clean"}, {"val_labels": "noisy"}


def some(count: int = 400, sharp: float = 3.0, seed: int = 0) -> after.Logits:
    """Logits that are right more often the surer they are, and `sharp` times too sure."""
    generator = np.random.default_rng(seed)

    def half(rows: int) -> tuple[np.ndarray, np.ndarray]:
        true = generator.normal(size=(rows, 3)) * 1.5
        shares = np.exp(true) / np.exp(true).sum(axis=1, keepdims=True)
        labels = (shares.cumsum(axis=1) > generator.random((rows, 1))).argmax(axis=1)
        return (true * sharp).astype(np.float32), labels

    (val, val_labels), (test, test_labels) = half(count), half(count)
    return after.Logits(
        val_labels=val_labels, val_best=val, val_final=val * 2, test_labels=test_labels, test_best=test,
        test_final=test * 2,
    )  # fmt: skip


def test_the_temperature_is_of_validation_and_mends_calibration_on_test():
    logits = some(4000)
    found = after.fitted(logits, "best", CLEAN, 0.0)
    assert found["temperature"] == pytest.approx(3, rel=0.1)
    assert after.fitted(logits, "final", CLEAN, 0.0)["temperature"] == pytest.approx(6, rel=0.1)
    assert found["calibration_error"]["after"] < 0.03 < 0.1 < found["calibration_error"]["before"]
    assert found["warning"] is None
    json.dumps(found, allow_nan=False)


def test_a_threshold_holds_what_it_says_on_both_splits():
    logits = some(4000)
    temperature = after.fitted(logits, "best", CLEAN, 0.0)["temperature"]
    found = after.threshold(logits, "best", temperature, 0.9)
    for split in ("val", "test"):
        scores, labels = getattr(logits, f"{split}_best") / temperature, getattr(logits, f"{split}_labels")
        powers = np.exp(scores.astype(np.float64))
        sure = (powers / powers.sum(axis=1, keepdims=True)).max(axis=1) >= found["threshold"]
        name = {"val": "validation", "test": "test"}[split]
        assert found[f"{name}_coverage"] == pytest.approx(sure.mean())
        assert found[f"{name}_accuracy"] == pytest.approx((scores.argmax(axis=1) == labels)[sure].mean())
    assert found["validation_accuracy"] >= 0.9
    assert found["test_accuracy"] > 0.85  # of other images: near what was wanted, not above it by right
    stricter = after.threshold(logits, "best", temperature, 0.95)
    assert stricter["threshold"] > found["threshold"]
    assert stricter["validation_coverage"] < found["validation_coverage"]


def test_wrong_validation_labels_are_said():
    found = after.fitted(some(), "best", NOISY, 0.31)
    assert "31 % are wrong" in found["warning"]
    assert "noisy labels" in found["fitted_on"]


def test_without_validation_labels_nothing_is_fitted():
    logits = some()
    logits.val_labels[:] = -1
    assert after.fitted(logits, "best", NOISY, 0.0) is None


def test_a_run_keeps_them_whole_or_says_what_to_do(tmp_path):
    logits = some()
    with pytest.raises(ConfigError, match=r"has no held_out\.npz.*train it again"):
        after.Logits.read(tmp_path)
    (tmp_path / after.FILE).write_bytes(logits.to_bytes())
    again = after.Logits.read(tmp_path)
    assert all(np.array_equal(getattr(again, name), getattr(logits, name)) for name in vars(logits))
    (tmp_path / after.FILE).write_bytes(logits.to_bytes()[:400])
    with pytest.raises(DataError, match=r"held_out\.npz is broken.*copy the run again"):
        after.Logits.read(tmp_path)
