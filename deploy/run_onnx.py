"""A bundle run by ONNX Runtime: on the GPU where its CUDA provider loads, else on the CPU."""

from pathlib import Path

import numpy as np
import onnxruntime

from noisyssl.deploy import bundle, cuda_driver
from noisyssl.deploy.onnx_scan import self_contained
from noisyssl.deploy.runtime import checked
from noisyssl.errors import BundleError, ConfigError, MachineError
from noisyssl.machine import int8_saturates

FATAL = 4
CUDA = ("CUDAExecutionProvider", {"use_tf32": "0"})  # TF32 would break the parity that export proved


class OnnxRuntime:
    """One ONNX file in one ONNX Runtime session; `logits` may be called from several threads.

    INT8 is for CPUs: on a GPU, ONNX Runtime computes Q/DQ in float32, and TensorRT is the runtime for it.
    """

    def __init__(
        self, folder: Path, device: str | None = None, threads: int | None = None, precision: str = "fp32"
    ) -> None:
        self.manifest = bundle.read(folder)
        if precision == "int8":
            if device == "cuda":
                raise ConfigError(
                    "precision int8 of ONNX Runtime is for CPUs, device is cuda; use --runtime tensorrt, or "
                    "--precision fp16."
                )
            device = "cpu"
        form = "int8-cpu" if precision == "int8" else precision
        name = bundle.model_file(folder, self.manifest, form)
        if (
            form == "int8-cpu"
            and int8_saturates()
            and not self.manifest.precisions.get(form, {}).get("reduced_range")
        ):
            raise MachineError(
                f"{folder / name} has 8-bit weights, whose sums overflow on this CPU without VNNI; use "
                "--precision fp32, or export with --set export.int8_range=reduced."
            )
        graph = bundle.content(folder, self.manifest, name)
        self_contained(graph, folder / name)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = FATAL  # what matters is raised; the rest is noise on stderr
        if threads:
            options.intra_op_num_threads = threads
        providers: list[object] = ["CPUExecutionProvider"]
        if (
            device != "cpu" and _has_cuda()
        ):  # asked of the driver first: a missing one makes the provider noisy
            onnxruntime.set_default_logger_severity(FATAL)
            providers.insert(0, CUDA)
        try:
            self._session = onnxruntime.InferenceSession(graph, options, providers=providers)
        except Exception as error:  # onnxruntime's own classes share no public base
            reason = " ".join(str(error).split())[:300]
            raise BundleError(
                f"{folder / name} cannot be loaded by ONNX Runtime {onnxruntime.__version__}: "
                f"{reason}. Export the bundle again."
            ) from error
        self._must_fit(folder / name)
        self.device = "cuda" if CUDA[0] in self._session.get_providers() else "cpu"
        if device == "cuda" and self.device != "cuda":
            raise MachineError(
                "device cuda is asked, but ONNX Runtime cannot use a GPU here; `noisyssl doctor` says what "
                "is missing. Leave --device out to run on the CPU."
            )

    def __enter__(self) -> "OnnxRuntime":
        return self

    def __exit__(self, *exc: object) -> None:
        pass  # the session frees its memory with the last reference

    def logits(self, images: np.ndarray) -> np.ndarray:
        """(B, K) float32; safe to keep."""
        batch = checked(images, self.manifest.input.size)
        if not len(batch):
            return np.empty((0, len(self.manifest.classes)), np.float32)
        return np.asarray(self._session.run(["logits"], {"image": batch})[0])

    def _must_fit(self, path: Path) -> None:
        """Raises BundleError unless the graph takes and gives what the manifest says."""
        size, classes = self.manifest.input.size, len(self.manifest.classes)
        found = {
            value.name: (value.type, list(value.shape[1:]))
            for value in (*self._session.get_inputs(), *self._session.get_outputs())
        }
        logits = ("tensor(float)", [classes])
        if found != {"image": ("tensor(uint8)", [size, size, 3]), "logits": logits, "probabilities": logits}:
            raise BundleError(
                f"{path} has inputs and outputs {str(found)[:200]}; the manifest says {size} pixels, "
                f"{classes} classes. Do not serve it; export the bundle again."
            )


def _has_cuda() -> bool:
    if CUDA[0] not in onnxruntime.get_available_providers() or cuda_driver.capability() is None:
        return False
    if hasattr(onnxruntime, "preload_dlls"):  # finds cuDNN and CUDA in the wheels beside it
        onnxruntime.preload_dlls()
    return True
