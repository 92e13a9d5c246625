"""After training: a temperature, and the confidence from which on answers are right often enough."""

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from noisyssl import selective
from noisyssl.errors import ConfigError, DataError
from noisyssl.evaluation import figures

FILE = "held_out.npz"
"""Where a run keeps the logits that this is fitted and measured on."""
WANTED = (0.9, 0.95, 0.99)
"""Accuracies whose thresholds the metrics hold."""
POINTS = 100
"""Points of a coverage-risk curve that the metrics hold."""


@dataclass(frozen=True, kw_only=True)
class Logits:
    """What BEST and the final weights say of validation, which fits, and of test, which measures."""

    val_labels: np.ndarray
    """(M,) int64 as given, -1 for none."""
    val_best: np.ndarray
    """(M, K) float32."""
    val_final: np.ndarray
    test_labels: np.ndarray
    """(N,) int64 true ones."""
    test_best: np.ndarray
    """(N, K) float32."""
    test_final: np.ndarray

    def of(self, which: str) -> tuple[np.ndarray, np.ndarray]:
        """Logits on validation and test of `which`, best or final."""
        return getattr(self, f"val_{which}"), getattr(self, f"test_{which}")

    def to_bytes(self) -> bytes:
        """As an .npz that needs no pickle."""
        buffer = io.BytesIO()
        np.savez(buffer, **asdict(self))
        return buffer.getvalue()

    @classmethod
    def read(cls, run: Path) -> "Logits":
        """Those of a finished run.

        Raises:
            ConfigError: it has none: it was trained by version 0.1.0 or earlier.
            DataError: the file is broken.
        """
        try:
            with np.load(run / FILE, allow_pickle=False) as kept:
                return cls(**dict(kept))
        except FileNotFoundError:
            raise ConfigError(
                f"{run} has no {FILE}, which trainings keep since version 0.2; copy the run again, whole, or "
                "train it again."
            ) from None
        except (ValueError, OSError, TypeError, BadZipFile) as error:
            raise DataError(f"{run / FILE} is broken ({error}); copy the run again, whole.") from None


def fitted(
    logits: Logits, which: str, noise: Mapping[str, Any], wrong: float | None
) -> dict[str, Any] | None:
    """Temperature and thresholds fitted on validation, and what they give on test; None without labels there.

    Args:
        which: best or final.
        noise: what `noisy_labels` says of the labels.
        wrong: share of the validation labels that are wrong; None if nobody knows.
    """
    labels, (val, test) = logits.val_labels, logits.of(which)
    if not (labels >= 0).any():
        return None
    temperature = selective.fit_temperature(val, labels)
    curve = selective.selection(test, logits.test_labels, temperature)
    return {
        "temperature": temperature,
        "fitted_on": f"{int((labels >= 0).sum())} validation images, {noise['val_labels']} labels",
        "warning": selective.warning(wrong, noise["val_labels"]),
        "calibration_error": {
            "before": _calibration_error(test, logits.test_labels, 1.0),
            "after": _calibration_error(test, logits.test_labels, temperature),
        },
        "area_under_risk": curve.area(),
        "curve": _thinned(curve),
        "thresholds": {str(wanted): threshold(logits, which, temperature, wanted) for wanted in WANTED},
    }


def served(
    run: Path, which: str, temperature: float, groups: list[str], classes: list[str]
) -> dict[str, Any]:
    """Test figures of a run's weights with their probabilities at `temperature`, as a bundle serves them.

    Args:
        groups: of the test images that the run measured, in its order.

    Raises:
        ConfigError, DataError: as `Logits.read`.
    """
    logits = Logits.read(run)
    _, test = logits.of(which)
    if len(groups) != len(test):
        raise DataError(
            f"{run / FILE} is of {len(test)} test images, not {len(groups)}; copy the run again, whole."
        )
    found = figures(test / temperature, logits.test_labels, groups, classes)
    return found.to_json() | {"temperature": temperature}


def threshold(logits: Logits, which: str, temperature: float, wanted: float) -> dict[str, Any] | None:
    """The lowest confidence with `wanted` accuracy on validation, and what it gives there and on test.

    None where no confidence gives it.
    """
    val, test = (
        selective.selection(scores, labels, temperature)
        for scores, labels in zip(logits.of(which), (logits.val_labels, logits.test_labels), strict=True)
    )
    found = val.threshold_for(wanted)
    if found is None:
        return None
    value, coverage, accuracy = found
    answered = np.flatnonzero(test.threshold >= value)
    last = answered[-1] if len(answered) else None
    return {
        "wanted_accuracy": wanted,
        "threshold": value,
        "validation_coverage": coverage,
        "validation_accuracy": accuracy,
        "test_coverage": 0.0 if last is None else float(test.coverage[last]),
        "test_accuracy": None if last is None else float(1 - test.risk[last]),
    }


def _calibration_error(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    names = [str(k) for k in range(logits.shape[1])]
    found = figures(logits / temperature, labels, np.arange(len(labels)), names, resamples=0)
    return found.calibration_error.value


def _thinned(one: selective.Selection) -> list[tuple[float, float]]:
    keep = np.unique(np.linspace(0, len(one.coverage) - 1, POINTS).astype(int))
    return [(float(one.coverage[i]), float(one.risk[i])) for i in keep]
