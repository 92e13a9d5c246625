"""The first NVIDIA GPU through its driver alone: name, capability, memory, one stream. No package needed.

`libcuda` comes with every driver; its calls below have kept their signatures since CUDA 4 (2011).
"""

import ctypes
import sys
from typing import Any

import numpy as np

from noisyssl.errors import MachineError

MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


def library() -> Any:
    """The driver's library.

    Raises:
        MachineError: no NVIDIA driver is installed.
    """
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return ctypes.CDLL(name)
    except OSError:
        raise MachineError(
            f"no NVIDIA driver is here ({name} is missing); this needs one. Install the driver, "
            "or use a runtime that needs no GPU (--runtime onnx)."
        ) from None


def capability() -> str | None:
    """The compute capability of the GPU, such as "SM86"; None where there is no usable GPU."""
    try:
        with Gpu() as gpu:
            return gpu.capability
    except MachineError:
        return None


class Gpu:
    """The GPU that CUDA lists first (`CUDA_VISIBLE_DEVICES` chooses), its primary context and one stream.

    Addresses and the stream are plain integers, as TensorRT's Python interface takes them.
    """

    def __init__(self, driver: Any = None) -> None:
        self._driver = driver or library()
        self._memory: set[int] = set()
        self.stream = 0
        self._context = ctypes.c_void_p()
        self._device = ctypes.c_int()
        count = ctypes.c_int()
        self._call("cuInit", ctypes.c_uint(0))
        self._call("cuDeviceGetCount", ctypes.byref(count))
        if not count.value:
            raise MachineError("the NVIDIA driver finds no GPU; this needs one. Check `nvidia-smi`.")
        self._call("cuDeviceGet", ctypes.byref(self._device), ctypes.c_int(0))
        text = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", text, ctypes.c_int(256), self._device)
        self.name = text.value.decode(errors="replace")
        self.capability = f"SM{self._attribute(MAJOR)}{self._attribute(MINOR)}"
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        stream = ctypes.c_void_p()
        try:
            self.enter()
            self._call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(0))
        except MachineError:
            self.close()
            raise
        self.stream = stream.value or 0

    def enter(self) -> None:
        """Make this GPU current in the calling thread."""
        self._call("cuCtxSetCurrent", self._context)

    def allocate(self, size: int) -> int:
        """The address of `size` new bytes; freed by `close`."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        self._memory.add(address.value)
        return address.value

    def upload(self, address: int, array: np.ndarray) -> None:
        """Queue a copy of the contiguous `array` to `address`; keep the array until `wait`."""
        self._call(
            "cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), ctypes.c_void_p(array.ctypes.data),
            ctypes.c_size_t(array.nbytes), ctypes.c_void_p(self.stream),
        )  # fmt: skip

    def download(self, array: np.ndarray, address: int) -> None:
        """Queue a copy from `address` into the contiguous `array`, which is filled after `wait`."""
        self._call(
            "cuMemcpyDtoHAsync_v2", ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64(address),
            ctypes.c_size_t(array.nbytes), ctypes.c_void_p(self.stream),
        )  # fmt: skip

    def wait(self) -> None:
        """Return when all that was queued is done."""
        self._call("cuStreamSynchronize", ctypes.c_void_p(self.stream))

    def close(self) -> None:
        """Free memory, stream and context; a second call does nothing."""
        if not self._context:
            return
        self.enter()
        for address in self._memory:
            self._call("cuMemFree_v2", ctypes.c_uint64(address))
        self._memory.clear()
        if self.stream:
            self._call("cuStreamDestroy_v2", ctypes.c_void_p(self.stream))
        self._call("cuDevicePrimaryCtxRelease_v2", self._device)
        self._context = ctypes.c_void_p()

    def __enter__(self) -> "Gpu":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _attribute(self, which: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(which), self._device)
        return value.value

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._driver, name)(*arguments):
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(ctypes.c_int(code), ctypes.byref(text))
            reason = (text.value or b"unknown").decode(errors="replace")
            raise MachineError(
                f"the NVIDIA driver answers {code} ({reason}) to {name}; it must answer 0. "
                "Check `nvidia-smi`, or use a runtime that needs no GPU (--runtime onnx)."
            )
