"""Checks and buffers of the TensorRT runtime, against stand-ins for the driver and for TensorRT."""

import ctypes
import json
from types import SimpleNamespace

import numpy as np
import pytest

from noisyssl.deploy import bundle as bundles
from noisyssl.deploy import run_tensorrt, to_tensorrt
from noisyssl.deploy.bundle import Architecture, Geometry, Input, Manifest, sha256, write
from noisyssl.deploy.runtime import open_runtime
from noisyssl.errors import BundleError, ConfigError, DataError, MachineError

SIZE = 8


class Gpu:
    """Host memory behind addresses; copies happen only at `wait`, as a stream may do."""

    def __init__(self):
        self.name, self.capability, self.stream = "NVIDIA RTX A4000", "SM86", 5
        self.memory, self.queue, self.closed = {}, [], False

    def enter(self):
        assert not self.closed

    def allocate(self, size):
        buffer = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    def upload(self, address, array):
        assert array.flags.c_contiguous
        assert array.nbytes <= len(self.memory[address])
        self.queue.append(lambda: ctypes.memmove(address, array.ctypes.data, array.nbytes))

    def download(self, array, address):
        assert array.flags.c_contiguous
        assert array.nbytes <= len(self.memory[address])
        self.queue.append(lambda: ctypes.memmove(array.ctypes.data, address, array.nbytes))

    def wait(self):
        for step in self.queue:
            step()
        self.queue.clear()

    def close(self):
        self.closed = True


class TensorRT:
    """A module whose engines answer the mean of each channel."""

    __version__ = "1.7.1.116"

    class ILogger:
        Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, INFO=3)

    def __init__(self, gpu, broken=""):
        self.gpu, self.broken, self.deserialised, self.shapes = gpu, broken, [], []
        self.addresses = {}

    def Runtime(self, log):
        self.log = log
        return self

    def deserialize_cuda_engine(self, data):
        self.deserialised.append(data)
        if self.broken == "engine":
            self.log.log(1, "magic tag\n does not match.")
            return None
        return self

    def create_execution_context(self):
        return self

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return name in ("image", "logits", "probabilities")

    def set_input_shape(self, name, shape):
        self.shapes.append(tuple(shape))
        return 2 <= shape[0] <= 4

    def execute_async_v3(self, stream):
        assert stream == self.gpu.stream
        shape = self.shapes[-1]

        def compute():
            size = int(np.prod(shape))
            image = np.frombuffer((ctypes.c_uint8 * size).from_address(self.addresses["image"]), np.uint8)
            answer = image.reshape(shape).mean(axis=(1, 2), dtype=np.float32)
            ctypes.memmove(self.addresses["logits"], answer.ctypes.data, answer.nbytes)

        self.gpu.queue.append(compute)
        return self.broken != "execute"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "engines").mkdir()
    (tmp_path / "model.onnx").write_bytes(b"graph")
    (tmp_path / "engines" / "model.tensorrt_rtx.plan").write_bytes(b"plan")
    describe(tmp_path)
    return tmp_path


def describe(folder, **changes):
    """(Re)write sidecar and manifest, with `changes` to the sidecar."""
    plan = folder / "engines" / "model.tensorrt_rtx.plan"
    sidecar = {
        "flavour": "tensorrt_rtx", "version": "1.7.1.116", "compute_capabilities": ["SM80", "SM86"],
        "profile": {"min": 2, "opt": 3, "max": 4}, "onnx_sha256": sha256(folder / "model.onnx"),
        "plan_sha256": sha256(plan),
    } | changes  # fmt: skip
    plan.with_name(plan.name + ".json").write_text(json.dumps(sidecar))
    (folder / "manifest.json").unlink(missing_ok=True)
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    manifest = Manifest(
        classes=("r", "g", "b"), input=Input(size=SIZE), geometry=Geometry(size=SIZE, fit="crop"),
        architecture=Architecture(backbone="resnet18", stem="plain"), checkpoint={}, training={}, figures={},
        parity={}, tools={}, files={name: sha256(folder / name) for name in names}, created="now",
    )  # fmt: skip
    write(folder, manifest)


@pytest.fixture
def machine(monkeypatch):
    gpu = Gpu()
    trt = TensorRT(gpu)
    monkeypatch.setattr(run_tensorrt, "Gpu", lambda: gpu)
    monkeypatch.setattr(to_tensorrt, "flavours", lambda: ["tensorrt_rtx"])
    monkeypatch.setattr(to_tensorrt, "load", lambda name: trt)
    return SimpleNamespace(gpu=gpu, trt=trt)


@pytest.mark.parametrize("count", [0, 1, 2, 4, 5, 9])
def test_any_batch_is_padded_or_split_and_the_answers_are_kept(folder, machine, count):
    generator = np.random.default_rng(count)
    first, second = generator.integers(0, 256, (2, count, SIZE, SIZE, 3), dtype=np.uint8)
    with open_runtime(folder, "tensorrt") as runtime:
        kept = runtime.logits(first)
        runtime.logits(second)
        memory = len(machine.gpu.memory)
        assert np.allclose(kept, first.mean(axis=(1, 2)), atol=1e-3)
        assert kept.shape == (count, 3)
        assert kept.dtype == np.float32
    assert memory == 3
    assert all(2 <= shape[0] <= 4 for shape in machine.trt.shapes)
    assert machine.gpu.closed


def test_views_that_are_not_contiguous_are_read_right(folder, machine):
    images = np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE, 3), dtype=np.uint8)[:, ::-1, ::-1]
    with open_runtime(folder, "tensorrt") as runtime:
        assert np.allclose(runtime.logits(images), images.mean(axis=(1, 2)), atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"compute_capabilities": ["SM89"]}, "is for SM89"),
        ({"compute_capabilities": []}, "is for"),
        ({"version": "1.6.0"}, r"is for tensorrt_rtx 1\.6\.0, installed is 1\.7\.1\.116"),
        ({"plan_sha256": "0" * 64}, "not the plan that its sidecar describes"),
        ({"onnx_sha256": "0" * 64}, r"built from another model\.onnx"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_before_it_is_deserialised(folder, machine, changes, words):
    describe(folder, **changes)
    with pytest.raises(BundleError, match=rf"RTX A4000 \(SM86\).*{words}.*--tensorrt SM86"):
        open_runtime(folder, "tensorrt")
    assert machine.trt.deserialised == []
    assert machine.gpu.closed


def test_another_flavour_names_its_package(folder, machine):
    describe(folder, flavour="tensorrt")
    with pytest.raises(MachineError, match=r"package 'tensorrt' is not installed.*noisyssl\[tensorrt\]"):
        open_runtime(folder, "tensorrt")
    assert machine.trt.deserialised == []


def test_an_altered_plan_is_refused_before_it_is_deserialised(folder, machine):
    (folder / "engines" / "model.tensorrt_rtx.plan").write_bytes(b"plam")
    with pytest.raises(BundleError, match="altered"):
        open_runtime(folder, "tensorrt")
    assert machine.trt.deserialised == []


def test_what_is_hashed_is_what_is_deserialised(folder, machine, monkeypatch):
    """Swapping the file after the check of the bundle does not help: its bytes are hashed again."""
    inner = bundles.read

    def read_then_swap(path):
        manifest = inner(path)
        (folder / "engines" / "model.tensorrt_rtx.plan").write_bytes(b"evil")
        return manifest

    monkeypatch.setattr(run_tensorrt.bundle, "read", read_then_swap)
    with pytest.raises(BundleError, match="altered"):
        open_runtime(folder, "tensorrt")
    assert machine.trt.deserialised == []


@pytest.mark.parametrize(
    "changes",
    [{"profile": {"min": 0, "max": 4}}, {"profile": {"max": 4}}, {"profile": {"min": 1, "max": 10**9}},
     {"profile": 3}, {"flavour": "other"}, {"version": 1}, {"compute_capabilities": "SM86"}],
)  # fmt: skip
def test_a_sidecar_that_is_not_understood_is_refused(folder, machine, changes):
    describe(folder, **changes)
    with pytest.raises(BundleError, match=r"plan\.json does not describe an engine"):
        open_runtime(folder, "tensorrt")


def test_no_engine_at_all_says_how_to_get_one(folder, machine):
    for path in (folder / "engines").iterdir():
        path.unlink()
    plan = folder / "model.plan"
    (folder / "manifest.json").unlink()
    values = {"model.onnx": sha256(folder / "model.onnx")}
    write(folder, Manifest(
        classes=("r", "g"), input=Input(size=SIZE), geometry=Geometry(size=SIZE, fit="crop"),
        architecture=Architecture(backbone="resnet18", stem="plain"), checkpoint={}, training={}, figures={},
        parity={}, tools={}, files=values, created="now",
    ))  # fmt: skip
    assert not plan.exists()
    with pytest.raises(
        BundleError,
        match=r"it has none\. Build one: `noisyssl engine BUNDLE --out NEW_BUNDLE --tensorrt SM86`",
    ):
        open_runtime(folder, "tensorrt")


def test_tensorrts_own_words_end_in_the_message(folder, machine):
    machine.trt.broken = "engine"
    with pytest.raises(BundleError, match=r"cannot be loaded: magic tag does not match\. Build one"):
        open_runtime(folder, "tensorrt")
    assert machine.gpu.closed


def test_a_failed_execution_is_no_answer(folder, machine):
    machine.trt.broken = "execute"
    with open_runtime(folder, "tensorrt") as runtime, pytest.raises(BundleError, match="fails to execute"):
        runtime.logits(np.zeros((2, SIZE, SIZE, 3), np.uint8))


def test_wrong_images_and_the_cpu_are_refused(folder, machine):
    with (
        open_runtime(folder, "tensorrt") as runtime,
        pytest.raises(DataError, match=r"takes \(B, 8, 8, 3\) uint8"),
    ):
        runtime.logits(np.zeros((2, 9, 9, 3), np.uint8))
    with pytest.raises(ConfigError, match="NVIDIA GPUs only"):
        open_runtime(folder, "tensorrt", device="cpu")
