"""Stands in for Triton's `dali` backend, which the wheel of nvidia-pytriton lacks, on the CPU.

Copied as `dali/model.py` into a backend directory; Triton's Python stub runs it there.
"""

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton
from nvidia.dali import Pipeline

TAKEN = b"used_dltensor"
rename = ctypes.pythonapi.PyCapsule_SetName
rename.argtypes = (ctypes.py_object, ctypes.c_char_p)


class TritonPythonModel:
    """The serialized graph of one version; a file that DALI cannot read fails its own request only."""

    def initialize(self, args: dict[str, str]) -> None:
        """Deserialise the version's file, as the real backend does."""
        config = json.loads(args["model_config"])
        name = config["default_model_filename"] or "model.dali"
        path = Path(args["model_repository"]) / args["model_version"] / name
        self.graph = path.read_bytes()
        self.batch = int(config["max_batch_size"])
        self.input, self.output = config["input"][0]["name"], config["output"][0]["name"]
        self.pipe = self._opened()

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response per request."""
        files = [
            list(np.from_dlpack(triton.get_input_tensor_by_name(request, self.input))) for request in requests
        ]
        try:
            views = self._run([file for group in files for file in group])
        except RuntimeError:
            return [self._alone(group) for group in files]
        ends = np.cumsum([len(group) for group in files])
        return [self._response(views[end - len(group) : end]) for group, end in zip(files, ends, strict=True)]

    def _alone(self, files: list[np.ndarray]) -> Any:
        try:
            return self._response(self._run(files))
        except RuntimeError:
            return triton.InferenceResponse(error=triton.TritonError("a file cannot be decoded"))

    def _run(self, files: list[np.ndarray]) -> np.ndarray:
        try:
            self.pipe.feed_input(self.input, files)
            (views,) = self.pipe.run()
            return np.array(views.as_tensor())
        except RuntimeError:
            self.pipe = self._opened()  # DALI's pipeline is dead after an error
            raise

    def _response(self, views: np.ndarray) -> Any:
        return triton.InferenceResponse([tensor(self.output, views)])

    def _opened(self) -> Any:
        return Pipeline.deserialize(
            serialized_pipeline=self.graph,
            batch_size=self.batch,
            num_threads=1,
            device_id=None,
            prefetch_queue_depth=1,
        )


def tensor(name: str, array: np.ndarray) -> Any:
    """A Triton tensor of an array, by DLPack: the stub's own way needs NumPy 1.

    The stub marks a capsule that it took with another name than DLPack's, on which NumPy would print an error
    for every tensor.
    """
    capsule = np.ascontiguousarray(array).__dlpack__()
    taken = triton.Tensor.from_dlpack(name, capsule)
    rename(ctypes.py_object(capsule), TAKEN)
    return taken
