"""Stands in for Triton's `onnxruntime` backend, which the wheel of nvidia-pytriton lacks, on the CPU.

Copied as `onnxruntime/model.py` into a backend directory; Triton's Python stub runs it there.
"""

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton

TAKEN = b"used_dltensor"
rename = ctypes.pythonapi.PyCapsule_SetName
rename.argtypes = (ctypes.py_object, ctypes.c_char_p)


class TritonPythonModel:
    """One session; the requests that the dynamic batcher gathered are one run of it."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the version's file, as the real backend does."""
        config = json.loads(args["model_config"])
        name = config["default_model_filename"] or "model.onnx"
        path = Path(args["model_repository"]) / args["model_version"] / name
        options = onnxruntime.SessionOptions()
        threads = config["parameters"].get("intra_op_thread_count", {}).get("string_value", "0")
        options.intra_op_num_threads = int(threads)
        self.inputs = [field["name"] for field in config["input"]]
        self.outputs = [field["name"] for field in config["output"]]
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response per request."""
        batches: dict[str, list[np.ndarray]] = {name: [] for name in self.inputs}
        for request in requests:
            for name, parts in batches.items():
                parts.append(np.from_dlpack(triton.get_input_tensor_by_name(request, name)))
        counts = [len(part) for part in batches[self.inputs[0]]]
        feed = {
            name: parts[0] if len(parts) == 1 else np.concatenate(parts) for name, parts in batches.items()
        }
        asked = [request.requested_output_names() for request in requests]
        names = [name for name in self.outputs if any(name in some for some in asked)]
        try:
            results = dict(zip(names, self.session.run(names, feed), strict=True))
        except Exception as error:  # what the stub itself makes of it shows the server's paths
            reason = triton.TritonError(" ".join(str(error).split()))
            return [triton.InferenceResponse(error=reason) for _ in requests]
        ends = np.cumsum(counts)
        return [
            triton.InferenceResponse([tensor(name, results[name][end - count : end]) for name in some])
            for some, count, end in zip(asked, counts, ends, strict=True)
        ]


def tensor(name: str, array: np.ndarray) -> Any:
    """A Triton tensor of an array, by DLPack: the stub's own way needs NumPy 1.

    The stub marks a capsule that it took with another name than DLPack's, on which NumPy would print an error
    for every tensor.
    """
    capsule = np.ascontiguousarray(array).__dlpack__()
    taken = triton.Tensor.from_dlpack(name, capsule)
    rename(ctypes.py_object(capsule), TAKEN)
    return taken
