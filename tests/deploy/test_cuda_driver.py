"""The driver's calls against a stand-in that keeps device memory in host buffers."""

import ctypes

import numpy as np
import pytest

from noisyssl.deploy import cuda_driver
from noisyssl.deploy.cuda_driver import Gpu
from noisyssl.errors import MachineError


class Driver:
    """What `libcuda` would do: every call notes its name; memory is real, so wrong addresses show."""

    def __init__(self, count=1, fails=""):
        self.count, self.fails = count, fails
        self.calls, self.memory, self.retained = [], {}, 0

    def __getattr__(self, name):
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments):
            self.calls.append(name)
            return 2 if name == self.fails else getattr(self, f"_{name}", lambda *a: 0)(*arguments) or 0

        return call

    def _cuDeviceGetCount(self, out):
        out._obj.value = self.count

    def _cuDeviceGetName(self, text, size, device):
        text.value = b"NVIDIA RTX A4000"

    def _cuDeviceGetAttribute(self, out, which, device):
        out._obj.value = {75: 8, 76: 6}[which.value]

    def _cuDevicePrimaryCtxRetain(self, out, device):
        out._obj.value, self.retained = 77, self.retained + 1

    def _cuDevicePrimaryCtxRelease_v2(self, device):
        self.retained -= 1

    def _cuStreamCreate(self, out, flags):
        out._obj.value = 99

    def _cuMemAlloc_v2(self, out, size):
        buffer = ctypes.create_string_buffer(size.value)
        out._obj.value = ctypes.addressof(buffer)
        self.memory[out._obj.value] = buffer

    def _cuMemFree_v2(self, address):
        del self.memory[address.value]

    def _cuMemcpyHtoDAsync_v2(self, address, host, size, stream):
        assert stream.value == 99
        ctypes.memmove(address.value, host.value, size.value)

    def _cuMemcpyDtoHAsync_v2(self, host, address, size, stream):
        assert stream.value == 99
        ctypes.memmove(host.value, address.value, size.value)

    def _cuGetErrorString(self, code, out):
        out._obj.value = b"out of memory"


def test_bytes_come_back_as_they_went():
    with Gpu(Driver()) as gpu:
        sent = np.arange(100, dtype=np.float32)
        address = gpu.allocate(sent.nbytes)
        gpu.upload(address, sent)
        back = np.zeros_like(sent)
        gpu.download(back, address)
        gpu.wait()
    assert np.array_equal(back, sent)
    assert (gpu.name, gpu.capability, gpu.stream) == ("NVIDIA RTX A4000", "SM86", 99)


def test_closing_gives_everything_back_once():
    driver = Driver()
    gpu = Gpu(driver)
    gpu.allocate(10), gpu.allocate(20)
    gpu.close()
    gpu.close()
    assert not driver.memory
    assert driver.retained == 0
    assert driver.calls.count("cuStreamDestroy_v2") == 1


@pytest.mark.parametrize("call", ["cuInit", "cuMemAlloc_v2", "cuStreamSynchronize", "cuMemcpyHtoDAsync_v2"])
def test_an_error_names_call_and_reason(call):
    def use():
        gpu = Gpu(Driver(fails=call))
        gpu.upload(gpu.allocate(4), np.zeros(1, np.float32))
        gpu.wait()

    with pytest.raises(
        MachineError, match=rf"answers 2 \(out of memory\) to {call}; it must answer 0\. Check"
    ):
        use()


def test_no_gpu_and_no_driver(monkeypatch):
    with pytest.raises(MachineError, match="finds no GPU"):
        Gpu(Driver(count=0))
    monkeypatch.setattr(cuda_driver.sys, "platform", "linux")
    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    with pytest.raises(
        MachineError, match=r"no NVIDIA driver is here \(libcuda.so.1 is missing\).*--runtime onnx"
    ):
        Gpu()
    assert cuda_driver.capability() is None


def test_a_failed_start_gives_the_context_back():
    driver = Driver(fails="cuStreamCreate")
    with pytest.raises(MachineError):
        Gpu(driver)
    assert driver.retained == 0
