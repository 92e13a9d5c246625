"""A bundle run by ONNX Runtime: on the GPU where its CUDA provider loads, else on the CPU."""

from pathlib import Path

import numpy as np
import onnxruntime

from noisyssl.deploy import bundle, cuda_driver
from noisyssl.deploy.runtime import checked
from noisyssl.errors import BundleError, MachineError

FATAL = 4
CUDA = ("CUDAExecutionProvider", {"use_tf32": "0"})  # TF32 would break the parity that export proved


class OnnxRuntime:
    """`model.onnx` in one ONNX Runtime session; `logits` may be called from several threads."""

    def __init__(self, folder: Path, device: str | None = None, threads: int | None = None) -> None:
        self.manifest = bundle.read(folder)
        graph = bundle.content(folder, self.manifest, bundle.ONNX)
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
                f"{folder / bundle.ONNX} cannot be loaded by ONNX Runtime {onnxruntime.__version__}: "
                f"{reason}. Export the bundle again."
            ) from error
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


def _has_cuda() -> bool:
    if CUDA[0] not in onnxruntime.get_available_providers() or cuda_driver.capability() is None:
        return False
    if hasattr(onnxruntime, "preload_dlls"):  # finds cuDNN and CUDA in the wheels beside it
        onnxruntime.preload_dlls()
    return True
