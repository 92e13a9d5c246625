"""A bundle run by TensorRT or TensorRT for RTX, from a plan of the bundle that fits this very machine.

An engine is native code: everything that can be known from its sidecar and digest is checked before it is
deserialised. Not executed on a GPU yet: checks and buffers are tested against stand-ins for the CUDA
driver and TensorRT.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from noisyssl.deploy import bundle, to_tensorrt
from noisyssl.deploy.bundle import Manifest
from noisyssl.deploy.cuda_driver import Gpu
from noisyssl.deploy.runtime import checked
from noisyssl.errors import BundleError, ConfigError, MachineError


class TensorRTRuntime:
    """One engine, one execution context, buffers for its largest batch; call it from one thread at a time."""

    device = "cuda"

    def __init__(
        self, folder: Path, device: str | None = None, threads: int | None = None, precision: str = "fp32"
    ) -> None:
        """`threads` has no meaning for an engine and is ignored."""
        if device == "cpu":
            raise ConfigError("device is cpu; TensorRT runs on NVIDIA GPUs only. Use --runtime onnx.")
        self.manifest = bundle.read(folder)
        self._gpu = Gpu()
        try:
            name, sidecar, trt = choose(folder, self.manifest, self._gpu, precision)
            self._load(folder, name, trt)
            self._largest: int = sidecar["profile"]["max"]
            self._smallest: int = sidecar["profile"]["min"]
            size, classes = self.manifest.input.size, len(self.manifest.classes)
            self._image = self._gpu.allocate(self._largest * size * size * 3)
            self._logits = self._gpu.allocate(self._largest * classes * 4)
            self._probabilities = self._gpu.allocate(self._largest * classes * 4)
            for tensor, address in (
                ("image", self._image), ("logits", self._logits), ("probabilities", self._probabilities)
            ):  # fmt: skip
                if not self._context.set_tensor_address(tensor, address):
                    raise self._failed(f"has no tensor {tensor!r}")
        except BaseException:
            self._gpu.close()
            raise

    def _load(self, folder: Path, name: str, trt: Any) -> None:
        self._log = to_tensorrt.logger(trt)
        self._runtime = trt.Runtime(self._log)
        self._path = folder / name
        self._engine = self._runtime.deserialize_cuda_engine(bundle.content(folder, self.manifest, name))
        if self._engine is None:
            raise self._failed("cannot be loaded")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise self._failed("cannot be run")

    def _failed(self, what: str) -> BundleError:
        reason = self._log.errors[-1] if self._log.errors else "TensorRT gives no reason"
        return BundleError(f"{self._path} {what}: {reason}. {rebuild(self._gpu)}")

    def __enter__(self) -> "TensorRTRuntime":
        return self

    def __exit__(self, *exc: object) -> None:
        self._context = self._engine = self._runtime = None  # before the memory and context they use
        self._gpu.close()

    def logits(self, images: np.ndarray) -> np.ndarray:
        """(B, K) float32; safe to keep. Batches beyond the profile are run in pieces, smaller ones padded."""
        batch = checked(images, self.manifest.input.size)
        found = np.empty((len(batch), len(self.manifest.classes)), np.float32)
        self._gpu.enter()
        for start in range(0, len(batch), self._largest):
            piece = batch[start : start + self._largest]
            count = len(piece)
            if count < self._smallest:
                piece = np.concatenate(
                    [piece, np.zeros((self._smallest - count, *piece.shape[1:]), np.uint8)]
                )
            self._gpu.upload(self._image, piece)
            if not self._context.set_input_shape("image", piece.shape):
                raise self._failed(f"refuses a batch of {len(piece)}")
            if not self._context.execute_async_v3(self._gpu.stream):
                raise self._failed("fails to execute")
            self._gpu.download(found[start : start + count], self._logits)
            self._gpu.wait()  # `piece` and the buffers are free again
        return found


def choose(
    folder: Path, manifest: Manifest, gpu: Gpu, precision: str = "fp32"
) -> tuple[str, dict[str, Any], Any]:
    """(name, sidecar, TensorRT module) of the first plan that fits the GPU and an installed TensorRT.

    Raises:
        BundleError: none does; the message says why and how to rebuild.
        MachineError: no TensorRT is installed that any plan was built for.
    """
    plans = sorted(name for name in manifest.files if name.startswith("engines/") and name.endswith(".plan"))
    reasons, missing = [], []
    for name in plans:
        sidecar = read_sidecar(folder, manifest, name)
        flavour = sidecar["flavour"]
        if sidecar.get("precision", "fp32") != precision:
            reasons.append(f"{name} computes in {sidecar['precision']}")
        elif sidecar["plan_sha256"] != manifest.files[name]:
            reasons.append(f"{name} is not the plan that its sidecar describes")
        elif sidecar["onnx_sha256"] != manifest.files.get(sidecar.get("onnx", bundle.ONNX)):
            reasons.append(f"{name} was built from another {sidecar.get('onnx', bundle.ONNX)}")
        elif gpu.capability not in sidecar["compute_capabilities"]:
            reasons.append(f"{name} is for {','.join(sidecar['compute_capabilities'])}")
        elif flavour not in to_tensorrt.flavours():
            missing.append(flavour)
            reasons.append(f"{name} needs the package {flavour}")
        else:
            trt = to_tensorrt.load(flavour)
            if sidecar["version"] == str(trt.__version__):
                return name, sidecar, trt
            reasons.append(f"{name} is for {flavour} {sidecar['version']}, installed is {trt.__version__}")
    if missing and len(missing) == len(reasons):
        raise MachineError(
            f"package {missing[0]!r} is not installed; the engine of {folder} needs it. "
            f"Run `pip install 'noisyssl[{to_tensorrt.EXTRAS[missing[0]]}]'`."
        )
    why = "; ".join(reasons) or "it has none"
    raise BundleError(
        f"{folder} has no {precision} engine for this {gpu.name} ({gpu.capability}): {why}. {rebuild(gpu)}"
    )


def read_sidecar(folder: Path, manifest: Manifest, name: str) -> dict[str, Any]:
    """What stands beside a plan, checked as far as the runtime relies on it.

    Raises:
        BundleError: it is missing or not understood.
    """
    try:
        values = json.loads(bundle.content(folder, manifest, f"{name}.json"))
        profile, capabilities = values["profile"], values["compute_capabilities"]
        sound = (
            values["flavour"] in to_tensorrt.FLAVOURS
            and all(type(values[key]) is str for key in ("version", "onnx_sha256", "plan_sha256"))
            and values.get("precision", "fp32") in (*bundle.PRECISIONS, "bf16", "mixed")
            and type(values.get("onnx", "")) is str
            and isinstance(capabilities, list)
            and all(type(item) is str for item in capabilities)
            and all(type(profile[key]) is int for key in ("min", "max"))
            and 1 <= profile["min"] <= profile["max"] <= 65536
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise BundleError(
            f"{folder / name}.json does not describe an engine; it must have flavour, version, "
            "compute_capabilities, profile and digests. Export the bundle again."
        )
    return dict(values)


def rebuild(gpu: Gpu) -> str:
    """The sentence that says how to get an engine for `gpu`."""
    return (
        f"Build one: `noisyssl engine BUNDLE --out NEW_BUNDLE --tensorrt {gpu.capability}`, or use "
        "--runtime onnx."
    )
