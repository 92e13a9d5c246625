"""The lower precisions of a bundle: each file is made, measured on the test images, kept or left out."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from noisyssl.deploy import bundle, parity, quantize, ranges, to_fp16
from noisyssl.deploy.bundle import FORMS, ONNX
from noisyssl.deploy.gates import Gates, compare, fp16_faults, int8_faults
from noisyssl.errors import ExportError
from noisyssl.evaluation import softmax

Batches = Callable[[], Iterable[np.ndarray]]
"""Images in batches of (B, S, S, 3) uint8, afresh each time it is called."""


def forms_of(precisions: Sequence[str]) -> list[str]:
    """The forms that `precisions` ask for; FP32 is always there."""
    wanted = {"fp32", *precisions}
    return [form for form in FORMS if form.partition("-")[0] in wanted]


def write(
    folder: Path,
    forms: Sequence[str],
    *,
    reference: np.ndarray,
    fp32: np.ndarray,
    images: Batches,
    calibration: Batches,
    labels: np.ndarray | None,
    gates: Gates,
    tolerance: float,
    reduced: bool,
    temperature: float = 1.0,
) -> dict[str, dict[str, Any]]:
    """By form, what was measured: `gates.compare`'s figures, `passed`, `why` not, and how it was made.

    The FP32 file is in `folder` and has passed its gate; the others are written beside it, and taken away
    again where they fail theirs.

    Args:
        reference, fp32: (N, K) logits of PyTorch and of the FP32 file on `images`.
        calibration: training images; they set the INT8 scales and say which nodes FP16 leaves in float32.
        labels: (N,) classes of `images`, -1 where unknown.
        reduced: INT8 weights of 7 bits for the CPU, see `machine.int8_saturates`.
        temperature: divides the logits before softmax, here as in the files.
    """
    reference, fp32 = reference / temperature, fp32 / temperature
    base = compare(reference, fp32, softmax(fp32), labels, tolerance)
    table: dict[str, dict[str, Any]] = {"fp32": {"file": ONNX, "passed": True, "why": "", **base}}
    lower = [form for form in forms if form != "fp32"]
    if not lower:
        return table
    seen: list[int] = []
    found = ranges.measure(folder / ONNX, _counted(calibration(), seen))
    tested = ranges.largest(ranges.measure(folder / ONNX, images())) if "fp16" in lower else {}
    for form in lower:
        path = folder / FORMS[form]
        made: dict[str, Any] = {"calibration_images": sum(seen)}
        if form == "fp16":
            made |= _fp16(folder / ONNX, path, ranges.largest(found), tested, gates)
        else:
            made["reduced_range"] = reduced and form == "int8-cpu"
            quantize.quantise(folder / ONNX, path, form, found, reduced=reduced)
        table[form] = _judged(form, path, reference, images, labels, gates, made, base, temperature)
        if not table[form]["passed"]:
            path.unlink()
    return table


def faults(table: dict[str, dict[str, Any]]) -> str:
    """One sentence about the forms that were left out; empty when there is none."""
    failed = {form: row["why"] for form, row in table.items() if not row["passed"]}
    return "; ".join(f"{form} was left out: {why}" for form, why in failed.items())


def _fp16(
    source: Path, path: Path, calibrated: dict[str, float], tested: dict[str, float], gates: Gates
) -> dict[str, Any]:
    """Write the FP16 copy; what it computes in FP16 is looked at on the test images."""
    import onnx

    model, islands = to_fp16.convert(onnx.load(source), calibrated, gates.fp16_range)
    halves = to_fp16.halves(model)
    bundle.save(path, model.SerializeToString(deterministic=True))
    largest = max((value for name, value in tested.items() if name in halves), default=0.0)
    return {"float32_islands": islands, "largest_activation": largest}


def _judged(
    form: str,
    path: Path,
    reference: np.ndarray,
    images: Batches,
    labels: np.ndarray | None,
    gates: Gates,
    made: dict[str, Any],
    base: dict[str, Any],
    temperature: float,
) -> dict[str, Any]:
    limits = {k: v for k, v in asdict(gates).items() if k.startswith(form.partition("-")[0])}
    row: dict[str, Any] = {"file": path.name, "passed": False, "why": "", "gates": limits, **made}
    try:
        run = parity.outputs_of(path)
        outputs = [run(batch) for batch in images()]
    except ExportError as error:  # not a number, or refused: no figures, and no file either
        return row | {"why": str(error).partition(". ")[0].partition("; ")[0]}
    logits, probabilities = (np.concatenate(part) for part in zip(*outputs, strict=True))
    row |= compare(reference, logits / temperature, probabilities, labels, gates.fp16_difference)
    broken = fp16_faults(row, gates) if form == "fp16" else int8_faults(row, base, gates)
    return row | {"passed": not broken, "why": "; ".join(broken)}


def _counted(images: Iterable[np.ndarray], seen: list[int]) -> Iterable[np.ndarray]:
    for batch in images:
        seen.append(len(batch))
        yield batch
