"""The gate: what was trained is what is served, measured on real images before a bundle exists."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from noisyssl.errors import DataError, ExportError, MachineError

if TYPE_CHECKING:
    from noisyssl.classifier import Classifier

BATCHES = (1, 2, 3, 17)
"""Batch sizes at which the dynamic batch is proved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """What the ONNX file computes against what the classifier computes, both in float32 on the CPU."""

    n: int
    """Images compared."""
    tolerance: float
    max_logit_difference: float
    top1_changes: int
    """Images whose top-1 class differs."""
    top1_changes_beyond_margin: int
    """Of these, images on which the classifier prefers its class by more than `tolerance`."""
    batches: dict[str, float]
    """Largest difference of logits by batch size, on the first images."""


Outputs = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def check(
    classifier: "Classifier", onnx_path: Path, images: Iterable[np.ndarray], tolerance: float = 1e-4
) -> Parity:
    """The measured parity of `onnx_path` with `classifier` on `images`: see `measure`."""
    return measure(classifier, onnx_path, images, tolerance)[0]


def measure(
    classifier: "Classifier",
    onnx_path: Path,
    images: Iterable[np.ndarray],
    tolerance: float = 1e-4,
    temperature: float = 1.0,
) -> tuple[Parity, np.ndarray, np.ndarray]:
    """(parity, (N, K) logits of `classifier`, (N, K) logits of the file) on batches of (B, S, S, 3) uint8.

    Raises:
        ExportError: a logit differs by more than `tolerance`, a top-1 class differs although the classifier
            prefers it by more than that, a value is not finite, or the probabilities are not the softmax
            of logits / `temperature`.
        DataError: there is no image.
        MachineError: ONNX Runtime is not installed.
    """
    import torch

    network = copy.deepcopy(classifier).cpu().float().eval()

    def reference(batch: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return network(torch.tensor(batch).permute(0, 3, 1, 2)).numpy()

    run = outputs_of(onnx_path)
    n = 0
    spread = 0.0
    first: list[np.ndarray] = []
    ours: list[np.ndarray] = []
    theirs: list[np.ndarray] = []
    for batch in images:
        ours.append(reference(batch))
        _finite(ours[-1], "the classifier")
        found, probabilities = run(batch)
        theirs.append(found)
        spread = max(spread, float(np.abs(probabilities - _softmax(found / temperature)).max()))
        n += len(batch)
        first.extend(batch[: max(BATCHES) - len(first)])
    if not n:
        raise DataError("the export gate got 0 images; it compares test images. Give the data a test split.")
    expected, served = np.concatenate(ours), np.concatenate(theirs)
    rows, old, new = np.arange(n), expected.argmax(1), served.argmax(1)
    changes = int((old != new).sum())
    beyond = int((expected[rows, old] - expected[rows, new] > tolerance).sum())
    worst = float(np.abs(served - expected).max())
    pile = np.stack([first[i % len(first)] for i in range(max(BATCHES))])
    piled = reference(pile)
    batches = {}
    for size in BATCHES:
        found, _ = run(pile[:size])
        batches[str(size)] = float(np.abs(found - piled[:size]).max())
    parity = Parity(
        n=n, tolerance=tolerance, max_logit_difference=worst, top1_changes=changes,
        top1_changes_beyond_margin=beyond, batches=batches,
    )  # fmt: skip
    largest = max(worst, *batches.values())
    if largest > tolerance or beyond or spread > 1e-5:
        raise ExportError(
            f"{onnx_path.name} differs from the checkpoint by {largest:.3g} in a logit and {spread:.1g} in a "
            f"probability, with {changes} of {n} top-1 classes changed ({beyond} beyond their margin); "
            f"at most {tolerance:g} is allowed. No bundle was written; install the versions of "
            "constraints.txt and export again."
        )
    return parity, expected, served


def outputs_of(onnx_path: Path) -> Outputs:
    """A function from (B, S, S, 3) uint8 to the file's (logits, probabilities) by ONNX Runtime on the CPU.

    Raises:
        ExportError: ONNX Runtime refuses the file, or, when called, a batch; or a logit is not finite.
        MachineError: ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MachineError(
            "package 'onnxruntime' is missing; export proves its file with it. "
            "Run `pip install 'noisyssl[onnx]'`."
        ) from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # torch and ONNX Runtime take turns here: waiting threads of one must not hold the cores of the other
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(str(onnx_path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes share no public base
        raise _refused(onnx_path, "to load", error) from error

    def run(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        try:
            logits, probabilities = session.run(["logits", "probabilities"], {"image": batch})
        except Exception as error:
            raise _refused(onnx_path, f"a batch of {len(batch)}", error) from error
        _finite(logits, onnx_path.name)
        return logits, probabilities

    return run


def _refused(path: Path, what: str, error: Exception) -> ExportError:
    reason = " ".join(str(error).split())[:300]
    return ExportError(
        f"{path.name} refuses {what} in ONNX Runtime: {reason}. No bundle was written; install the versions "
        "of constraints.txt and export again."
    )


def _finite(logits: np.ndarray, who: str) -> None:
    if bad := int((~np.isfinite(logits).all(axis=1)).sum()):
        raise ExportError(
            f"{who} gives logits that are not finite for {bad} of {len(logits)} images; no bundle was "
            "written. Export another checkpoint or train again with a lower train.lr."
        )


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)
