"""What a lower precision may cost: its figures on the test set, and the limits it must keep to be served.

What the gate on this CPU sees: the rounding of FP16 weights, and that of activations wherever ONNX Runtime
keeps a cast; it computes FP16 nodes in float32 and drops casts it thinks useless. What it cannot see: FP16
sums and FP16 overflow on a GPU. So the ranges of the float32 activations are measured as well, and nothing
near FP16's limit is computed in it. INT8 is exact here: integer kernels, or float32 ones on rounded values.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from noisyssl.evaluation import figures, softmax

ACCURACIES = ("balanced_accuracy", "macro_auroc", "calibration_error")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gates:
    """The limits; every one can be set in `[export]`."""

    fp16_flips: float = 0.001
    """Share of the images whose top-1 class may change; one image always may."""
    fp16_difference: float = 1e-2
    """Largest difference of a probability; a change of class within it does not count."""
    fp16_range: float = 16384.0
    """Largest activation or weight computed in FP16, which ends at 65504."""
    int8_agreement: float = 0.99
    """Smallest share of the images that keep their class."""
    int8_auroc_drop: float = 0.002
    """Largest loss of macro-AUROC against FP32; 1 asks for none, and needs no labels."""


def compare(
    reference: np.ndarray,
    logits: np.ndarray,
    probabilities: np.ndarray,
    labels: np.ndarray | None,
    margin: float,
) -> dict[str, Any]:
    """What a form computes against PyTorch, and how right it is.

    Args:
        reference: (N, K) logits of PyTorch.
        logits, probabilities: (N, K) outputs of the file.
        labels: (N,) true classes, -1 where unknown; accuracies are None without any.
        margin: a change of class counts only where PyTorch prefers its class by a probability above this.
    """
    expected = softmax(reference)
    rows, old, new = np.arange(len(expected)), reference.argmax(1), logits.argmax(1)
    preference = expected[rows, old] - expected[rows, new]
    changed = int((old != new).sum())
    found: dict[str, Any] = {
        "n": len(reference),
        "top1_changes": changed,
        "top1_changes_beyond_margin": int((preference > margin).sum()),
        "agreement": 1 - changed / len(reference),
        "max_probability_difference": float(np.abs(probabilities - expected).max()),
    }
    known = labels >= 0 if labels is not None else np.zeros(len(reference), bool)
    if labels is None or not known.any():
        return found | dict.fromkeys(ACCURACIES)
    names = [str(k) for k in range(reference.shape[1])]
    judged = figures(logits[known], labels[known], np.arange(known.sum()), names, resamples=0)
    return found | {name: _defined(getattr(judged, name).value) for name in ACCURACIES}


def fp16_faults(found: Mapping[str, Any], gates: Gates) -> list[str]:
    """Every limit that an FP16 file breaks; `found` is `compare`'s, with `largest_activation`."""
    flips, most = found["top1_changes_beyond_margin"], max(1, int(gates.fp16_flips * found["n"]))
    difference, largest = found["max_probability_difference"], found["largest_activation"]
    faults = {
        f"{flips} of {found['n']} top-1 classes change beyond the margin, at most {most} may": flips > most,
        f"a probability differs by {difference:.2g}, at most {gates.fp16_difference:g} is allowed": (
            difference > gates.fp16_difference
        ),
        f"an activation in FP16 reaches {largest:.4g}, at most {gates.fp16_range:g} is allowed": (
            largest > gates.fp16_range
        ),
    }
    return [fault for fault, broken in faults.items() if broken]


def int8_faults(found: Mapping[str, Any], fp32: Mapping[str, Any], gates: Gates) -> list[str]:
    """Every limit that an INT8 file breaks; both are `compare`'s."""
    agreement, before, after = found["agreement"], fp32["macro_auroc"], found["macro_auroc"]
    faults = []
    if agreement < gates.int8_agreement:
        faults.append(
            f"{100 * agreement:.2f} % of {found['n']} images keep their top-1 class, at least "
            f"{100 * gates.int8_agreement:g} % must"
        )
    if gates.int8_auroc_drop >= 1:
        return faults
    if before is None or after is None:
        faults.append("macro-AUROC is undefined on the test set, which needs labels of 2 or more classes")
    elif before - after > gates.int8_auroc_drop:
        faults.append(
            f"macro-AUROC falls by {before - after:.4f} to {after:.4f}, at most {gates.int8_auroc_drop:g} "
            "is allowed"
        )
    return faults


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else value
