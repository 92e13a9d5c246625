"""One way to run a bundle, whoever executes it."""

from pathlib import Path
from pkgutil import resolve_name
from typing import Protocol

import numpy as np

from noisyssl.deploy.bundle import PRECISIONS, Manifest
from noisyssl.errors import ConfigError, DataError, MachineError, pick

RUNTIMES = {  # name: (class, extra that installs it)
    "onnx": ("noisyssl.deploy.run_onnx:OnnxRuntime", "onnx"),
    "onnx-tensorrt": ("noisyssl.deploy.run_onnx:OnnxTensorRT", "onnx"),
    "tensorrt": ("noisyssl.deploy.run_tensorrt:TensorRTRuntime", "rtx"),
    "torch": ("noisyssl.deploy.run_torch:TorchRuntime", "train"),
    "triton": ("noisyssl.deploy.run_triton:TritonRuntime", "triton"),
}
DEVICES = ("cpu", "cuda")


class Runtime(Protocol):
    """A loaded bundle; use it in a `with`, which frees what it holds."""

    manifest: Manifest
    device: str
    """Where it computes: cpu, cuda, or the server of a client."""

    def __enter__(self) -> "Runtime": ...
    def __exit__(self, *exc: object) -> None: ...

    def logits(self, images: np.ndarray) -> np.ndarray:
        """(B, K) float32 for (B, size, size, 3) uint8 RGB images, any B; safe to keep.

        Raises:
            DataError: the images have another shape or type.
        """
        ...


def open_runtime(
    bundle: Path,
    name: str = "onnx",
    device: str | None = None,
    threads: int | None = None,
    precision: str = "fp32",
) -> Runtime:
    """The runtime called `name`, loaded with `bundle`, every file of which was verified first.

    Without `device` a GPU is used where the runtime finds one. `threads` limits the CPU threads of one
    call of `logits`; None leaves it to the runtime. `precision` is fp32, the one whose figures the manifest
    states first, or fp16 or int8 where the bundle has it: never taken without being asked for.

    Raises:
        ConfigError: unknown name, device or precision, no such folder.
        MachineError: its package is not installed, or the device is not here.
        BundleError: the bundle is altered, or not for this machine.
    """
    target, extra = pick(RUNTIMES, name, "runtime")
    if device is not None:
        pick(dict.fromkeys(DEVICES), device, "device")
    pick(dict.fromkeys(PRECISIONS), precision, "precision")
    if threads is not None and threads < 1:
        raise ConfigError(f"--threads is {threads}; it must be at least 1.")
    try:
        kind = resolve_name(target)
    except ImportError as error:
        raise MachineError(
            f"runtime {name!r} needs the package {error.name!r}; run `pip install 'noisyssl[{extra}]'`."
        ) from error
    opened: Runtime = kind(bundle, device, threads, precision)
    return opened


def checked(images: np.ndarray, size: int) -> np.ndarray:
    """`images`, contiguous, when they are what the graph takes.

    Raises:
        DataError: they are not.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (size, size, 3):
        raise DataError(
            f"images are {images.shape} {images.dtype}; the bundle takes (B, {size}, {size}, 3) uint8. "
            "Bring them there with noisyssl.geometry.evaluation_view."
        )
    return np.ascontiguousarray(images)
