import os
import subprocess
import sys

import numpy as np
import pytest

from noisyssl.deploy import cuda_driver, runtime
from noisyssl.deploy.bundle import own_digest
from noisyssl.deploy.runtime import open_runtime
from noisyssl.errors import BundleError, ConfigError, DataError, MachineError

no_gpu = pytest.mark.skipif(cuda_driver.capability() is not None, reason="this machine has a GPU")


@pytest.fixture(scope="module")
def truth(classifier, images):
    import torch

    with torch.no_grad():
        return classifier(torch.tensor(images[0]).permute(0, 3, 1, 2)).numpy()


@pytest.mark.parametrize("name", ["onnx", "torch"])
def test_every_runtime_gives_the_classifiers_logits(exported, images, truth, name):
    with open_runtime(exported, name, device="cpu", threads=1) as opened:
        kept = opened.logits(images[0])
        copy = kept.copy()
        opened.logits(images[1])
        assert np.array_equal(kept, copy)  # safe to keep
        assert kept.dtype == np.float32
        assert np.abs(kept - truth).max() <= 1e-4
        assert opened.logits(images[0][:0]).shape == (0, 3)
        one = np.concatenate([opened.logits(images[0][i : i + 1]) for i in range(5)])
        assert np.abs(one - truth[:5]).max() <= 1e-4
        assert np.abs(opened.logits(images[0][:, :, ::-1][:, :, ::-1]) - truth).max() <= 1e-4
        assert opened.device == "cpu"
        assert opened.manifest.classes[0] == "benign"


@pytest.mark.parametrize("name", ["onnx", "torch"])
@pytest.mark.parametrize(
    "wrong", [np.zeros((2, 3, 32, 32), np.uint8), np.zeros((2, 32, 32, 3)), np.zeros((32, 32, 3), np.uint8)]
)
def test_other_images_are_refused(exported, name, wrong):
    with open_runtime(exported, name, device="cpu") as opened:
        with pytest.raises(DataError, match=r"the bundle takes \(B, 32, 32, 3\) uint8"):
            opened.logits(wrong)


def test_read_only_images_are_fine(exported, images, recwarn):
    batch = images[0].copy()
    batch.flags.writeable = False
    with open_runtime(exported, "torch", device="cpu") as opened:
        opened.logits(batch)
    assert not [w for w in recwarn.list if "writable" in str(w.message)]


def test_unknown_names_are_near_misses(exported):
    with pytest.raises(ConfigError, match=r"runtime 'onxn' is unknown.*Did you mean 'onnx'"):
        open_runtime(exported, "onxn")
    with pytest.raises(ConfigError, match="device 'gpu' is unknown; choose one of cpu, cuda"):
        open_runtime(exported, "onnx", device="gpu")
    with pytest.raises(ConfigError, match="--threads is 0"):
        open_runtime(exported, "onnx", threads=0)


def test_a_missing_package_names_its_extra(exported, monkeypatch):
    monkeypatch.setitem(runtime.RUNTIMES, "tensorrt", ("tensorrt_absent:X", "rtx"))
    with pytest.raises(MachineError, match=r"'tensorrt_absent'; run `pip install 'noisyssl\[rtx\]'`"):
        open_runtime(exported, "tensorrt")


@no_gpu
@pytest.mark.parametrize("name", ["onnx", "onnx-tensorrt", "torch", "tensorrt"])
def test_a_gpu_that_is_not_here_is_said(exported, name, capfd):
    with pytest.raises(MachineError, match=r"GPU|driver"):
        open_runtime(exported, name, device="cuda")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("precision", "flags"), [("fp32", {}), ("fp16", {"trt_fp16_enable": "1"})])
def test_the_tensorrt_provider_is_asked_first_and_must_be_there(exported, monkeypatch, precision, flags):
    """A stand-in: sessions that say which providers they got; no GPU of this project has run the real one."""
    import onnxruntime

    from noisyssl.deploy import run_onnx

    asked, loads = [], [run_onnx.TENSORRT, run_onnx.CUDA[0]]
    real = onnxruntime.InferenceSession

    class Session:
        def __init__(self, graph, options, providers):
            asked.append(providers)
            self.inner = real(graph, options, providers=["CPUExecutionProvider"])

        def get_providers(self):
            return loads

        def __getattr__(self, name):
            return getattr(self.inner, name)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [run_onnx.TENSORRT, run_onnx.CUDA[0]])
    monkeypatch.setattr(run_onnx, "_has_cuda", lambda: True)
    monkeypatch.setattr(run_onnx.bundle, "model_file", lambda folder, manifest, form: "model.onnx")
    images = np.zeros((2, 32, 32, 3), np.uint8)
    with open_runtime(exported, "onnx-tensorrt", precision=precision) as opened:
        assert opened.device == "cuda"
        assert opened.logits(images).shape == (2, 3)
    assert asked[0][0] == (run_onnx.TENSORRT, flags)
    loads.remove(run_onnx.TENSORRT)  # ONNX Runtime goes on without a provider that does not load
    with pytest.raises(MachineError, match="cannot load its TensorRT provider here"):
        open_runtime(exported, "onnx-tensorrt")
    with pytest.raises(ConfigError, match="device is cpu; use --runtime onnx"):
        open_runtime(exported, "onnx-tensorrt", device="cpu")


def test_weights_that_do_not_fit_their_architecture_are_refused(exported, bundle):
    import json

    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["architecture"]["backbone"] = "resnet18-w32"
    manifest["sha256"] = own_digest(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="does not fit resnet18-w32 with the plain stem"):
        open_runtime(bundle, "torch")


def test_serving_needs_neither_torch_nor_dali(exported, tmp_path):
    np.save(tmp_path / "images.npy", np.zeros((2, 32, 32, 3), np.uint8))
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'torchvision', 'nvidia.dali', 'onnx')))\n"
        "import numpy as np, pathlib\n"
        "import noisyssl.deploy.bundle, noisyssl.deploy.predict, noisyssl.deploy.run_tensorrt\n"
        "from noisyssl.deploy.runtime import open_runtime\n"
        "with open_runtime(pathlib.Path(sys.argv[1]), 'onnx') as opened:\n"
        "    print(opened.logits(np.load(sys.argv[2])).shape)\n"
    )
    command = [sys.executable, "-c", code, str(exported), str(tmp_path / "images.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("(2, 3)\n", "")


SESSION = """
import {first}
import onnxruntime
onnxruntime.InferenceSession({model!r}, providers=["CPUExecutionProvider"])
"""


def test_onnx_runtime_reports_to_nobody(exported, tmp_path):
    """Its telemetry leaves an identifier of the machine in the home folder before it sends anything."""
    kept = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    for first in ("noisyssl", "sys"):  # with us and without
        home = tmp_path / first
        home.mkdir()
        code = SESSION.format(first=first, model=str(exported / "model.onnx"))
        environment = kept | {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")}
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    left = {first: [p.name for p in (tmp_path / first).rglob("deviceid")] for first in ("noisyssl", "sys")}
    assert left["noisyssl"] == []
    if not left["sys"]:
        pytest.skip("this ONNX Runtime has no telemetry that the test could see")
