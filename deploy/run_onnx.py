"""A bundle run by ONNX Runtime: by its CUDA provider where that loads, else on the CPU; TensorRT if asked.

Options of the TensorRT provider: onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html.
"""

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
TENSORRT = "TensorrtExecutionProvider"
FLAGS = {
    "fp32": {},
    "fp16": {"trt_fp16_enable": "1"},
    "int8-trt": {"trt_int8_enable": "1", "trt_fp16_enable": "1"},
}
"""What TensorRT may compute in beside float32, by the form of the file, whose types say where."""


class OnnxRuntime:
    """One ONNX file in one ONNX Runtime session; `logits` may be called from several threads.

    INT8 is for CPUs: on a GPU, ONNX Runtime computes Q/DQ in float32, and TensorRT is the runtime for it.
    """

    def __init__(
        self, folder: Path, device: str | None = None, threads: int | None = None, precision: str = "fp32"
    ) -> None:
        self.manifest = bundle.read(folder)
        form, device = self._form(precision, device)
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
        # between two calls the cores belong to who decodes, or to another session: with threads that spin on
        # after a call a second session on two cores took half as long again
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if threads:
            options.intra_op_num_threads = threads
        providers = self._providers(form, device)
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

    def _form(self, precision: str, device: str | None) -> tuple[str, str | None]:
        """Which file serves a precision, and the device that it is for."""
        if precision != "int8":
            return precision, device
        if device == "cuda":
            raise ConfigError(
                "precision int8 of ONNX Runtime is for CPUs, device is cuda; use --runtime tensorrt or "
                "onnx-tensorrt, or --precision fp16."
            )
        return "int8-cpu", "cpu"

    def _providers(self, form: str, device: str | None) -> list[object]:
        """ONNX Runtime's providers, the preferred one first."""
        if device != "cpu" and _has_cuda():  # of the driver first: a missing one makes the provider noisy
            onnxruntime.set_default_logger_severity(FATAL)
            return [CUDA, "CPUExecutionProvider"]
        return ["CPUExecutionProvider"]

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


class OnnxTensorRT(OnnxRuntime):
    """The same, computed by ONNX Runtime's TensorRT provider, which builds an engine when it is opened.

    Raises:
        MachineError: from the constructor, when that provider does not load here.
    """

    def __init__(
        self, folder: Path, device: str | None = None, threads: int | None = None, precision: str = "fp32"
    ) -> None:
        if device == "cpu":
            raise ConfigError("runtime onnx-tensorrt computes on a GPU, device is cpu; use --runtime onnx.")
        super().__init__(folder, None, threads, precision)
        if TENSORRT not in self._session.get_providers():
            raise MachineError(
                "ONNX Runtime cannot load its TensorRT provider here, as a rule because the TensorRT that it "
                "was built for is missing. Use --runtime onnx, or --runtime tensorrt with its engines."
            )

    def _form(self, precision: str, device: str | None) -> tuple[str, str | None]:
        return "int8-trt" if precision == "int8" else precision, device

    def _providers(self, form: str, device: str | None) -> list[object]:
        if TENSORRT not in onnxruntime.get_available_providers() or not _has_cuda():
            raise MachineError(
                "runtime onnx-tensorrt needs an NVIDIA GPU and TensorRT's libraries; `noisyssl doctor` says "
                "what is missing. Use --runtime onnx."
            )
        onnxruntime.set_default_logger_severity(FATAL)
        return [(TENSORRT, FLAGS[form]), CUDA, "CPUExecutionProvider"]


def _has_cuda() -> bool:
    if CUDA[0] not in onnxruntime.get_available_providers() or cuda_driver.capability() is None:
        return False
    if hasattr(onnxruntime, "preload_dlls"):  # finds cuDNN and CUDA in the wheels beside it
        onnxruntime.preload_dlls()
    return True
