"""The smallest and largest value of every activation of an exported file, over real images."""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from noisyssl.errors import MachineError


def measure(onnx_path: Path, images: Iterable[np.ndarray]) -> Any:
    """ONNX Runtime's `TensorsData`, tensor -> range, of batches of (B, S, S, 3) uint8; its own calibrator.

    MinMax: nothing is clipped, and memory holds two numbers per tensor and batch.

    Raises:
        MachineError: ONNX Runtime is not installed, or an antique.
    """
    try:
        from onnxruntime.quantization import CalibrationMethod
        from onnxruntime.quantization.calibrate import create_calibrator
    except ImportError as error:
        raise MachineError(
            f"package {error.name!r} is missing; lower precisions are made with ONNX Runtime. "
            "Run `pip install 'noisyssl[onnx]'`."
        ) from None
    with tempfile.TemporaryDirectory() as folder:
        calibrator = create_calibrator(
            onnx_path,
            None,  # every float tensor
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=CalibrationMethod.MinMax,
        )
        calibrator.collect_data(_Reader(images))
        return calibrator.compute_data()


def largest(ranges: Any) -> dict[str, float]:
    """Largest |value| by tensor."""
    return {
        name: float(max(np.abs(np.asarray(edge)).max() for edge in data.range_value))
        for name, data in ranges.items()
    }


class _Reader:
    """Batches as the calibrator asks for them."""

    def __init__(self, images: Iterable[np.ndarray]) -> None:
        self.images: Iterator[np.ndarray] = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.images, None)
        return None if batch is None else {"image": batch}


@contextmanager
def quiet() -> Iterator[None]:
    """ONNX Runtime's quantiser logs advice to the root logger; what matters is checked by the gate."""
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
