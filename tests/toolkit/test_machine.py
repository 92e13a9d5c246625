"""The machine's facts, and `noisyssl doctor` in broken environments."""

import json
import re
import subprocess
import sys
import time
import tomllib
import types
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from noisyssl import machine
from noisyssl.cli import doctor

H200 = "NVIDIA H200, 580.95.05, 9.0, 143771, 700.00, 1980\n"
RTX = "NVIDIA RTX 4000 Ada, 580.95.05, 8.9, 20475, [N/A], 3105\n"


@pytest.fixture
def smi(monkeypatch, tmp_path):
    """Puts an `nvidia-smi` on PATH that prints the given text."""

    def install(text: str, code: int = 0) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\nprintf '%s' '{text}'\nexit {code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return install


@pytest.fixture
def absent(monkeypatch):
    """Makes modules uninstalled, as far as an import can tell."""

    def remove(*modules: str) -> None:
        for name in modules:
            monkeypatch.setitem(sys.modules, name, None)

    return remove


@pytest.fixture
def present(monkeypatch, tmp_path):
    """Makes a module importable with this source."""

    def add(name: str, source: str = "") -> Path:
        folder = tmp_path / "site" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path / "site")
        monkeypatch.delitem(sys.modules, name, raising=False)
        return folder

    yield add
    for name in ("onnxruntime", "tensorrt", "tensorrt_rtx", "pytriton"):
        if isinstance(module := sys.modules.get(name), types.ModuleType) and str(tmp_path) in str(
            module.__file__
        ):
            del sys.modules[name]


def lines() -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.examine()}


def test_facts_are_json_with_cores_and_memory():
    found = machine.facts()
    assert json.loads(json.dumps(found)) == found
    assert found["cores"] >= 1
    assert 0 < machine.memory()[1] <= machine.memory()[0]
    assert found["memory_gib"] == pytest.approx(machine.memory()[0], abs=0.05)


def test_versions_import_nothing():
    code = (
        "import sys; from noisyssl import machine\n"
        "machine.versions(); machine.facts(); print(sorted(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "numpy", "onnx", "nvidia"} & set(re.findall(r"'(\w+)'", out))
    import numpy

    assert machine.versions(("numpy", "no-such-package")) == {"numpy": numpy.__version__}


def test_gpus_are_read_from_nvidia_smi(smi):
    smi(H200 + RTX)
    first, second = machine.gpus()
    assert first == {
        "name": "NVIDIA H200",
        "driver": "580.95.05",
        "capability": "9.0",
        "memory_gib": 140.4,
        "power_w": 700.0,
        "clock_mhz": 1980.0,
    }
    assert second["power_w"] is None


def test_a_driver_that_fails_means_no_gpu(smi, monkeypatch, tmp_path):
    smi("NVIDIA-SMI has failed because it could not communicate with the driver.", code=9)
    assert machine.gpus() == []
    device = tmp_path / "pci" / "0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x10de\n")
    (device / "class").write_text("0x030200\n")
    assert doctor._nvidia_card(tmp_path / "pci")
    monkeypatch.setattr(doctor, "_nvidia_card", lambda: True)
    check = lines()["GPU"]
    assert not check.ok
    assert "driver does not answer" in check.detail
    assert check.fix
    assert "install" in check.fix


def test_a_machine_without_a_card_gets_no_command(monkeypatch):
    monkeypatch.setattr(machine, "gpus", list)
    monkeypatch.setattr(doctor, "_nvidia_card", lambda: False)
    assert lines()["GPU"].fix is None


@pytest.mark.parametrize(
    ("modules", "line", "fix"),
    [
        (("torch",), "training", "pip install 'noisyssl[train]'"),
        (("safetensors",), "training", "pip install 'noisyssl[train]'"),
        (("nvidia",), "DALI", "pip install 'noisyssl[train]'"),
        (("nvidia.dali",), "DALI", "pip install 'noisyssl[train]'"),
        (("onnxscript",), "ONNX export", "pip install 'noisyssl[onnx]'"),
        (("onnxruntime",), "ONNX Runtime", "pip install 'noisyssl[onnx]'"),
        (("tensorrt", "tensorrt_rtx"), "TensorRT", "pip install 'noisyssl[rtx]'"),
        (("pytriton",), "Triton", "pip install nvidia-pytriton 'tritonclient[http,grpc]'"),
        (("jinja2",), "report", "pip install 'noisyssl[report]'"),
        (("gdcm", "jpeg_ls"), "DICOM", "pip install 'noisyssl[dicom]'"),
    ],
)
def test_a_missing_package_names_one_command(absent, monkeypatch, modules, line, fix):
    monkeypatch.setattr(machine, "gpus", list)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    absent(*modules)
    check = lines()[line]
    assert (check.ok, check.fix) == (False, fix)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ImportError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13"),
        ("", "get_available_providers"),
    ],
)
def test_a_broken_onnxruntime_is_repaired_not_installed(present, monkeypatch, source, reason):
    monkeypatch.setattr(machine, "gpus", list)
    present("onnxruntime", source)
    check = lines()["ONNX Runtime"]
    assert not check.ok
    assert reason in check.detail
    assert "--force-reinstall" in str(check.fix)


def test_a_cpu_only_onnxruntime_is_enough_without_a_gpu_only(present, smi, monkeypatch):
    present("onnxruntime", "def get_available_providers(): return ['CPUExecutionProvider']")
    smi(RTX)
    assert lines()["ONNX Runtime"].fix == "pip install 'noisyssl[onnx]'"
    monkeypatch.setattr(machine, "gpus", list)
    assert lines()["ONNX Runtime"].ok


def test_tensorrt_for_rtx_does_not_serve_an_h200(present, absent, smi):
    present("tensorrt_rtx")
    absent("tensorrt")
    smi(RTX)
    assert lines()["TensorRT"].ok
    smi(H200)
    check = lines()["TensorRT"]
    assert (check.ok, check.fix) == (False, "pip install 'noisyssl[tensorrt]'")


def test_triton_is_found_inside_its_wheel_and_on_path(present, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    folder = present("pytriton")
    assert not lines()["Triton"].ok
    program = folder / "tritonserver" / "bin" / "tritonserver"
    program.parent.mkdir(parents=True)
    program.write_text("")
    assert lines()["Triton"].ok
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    assert "tritonserver at" in lines()["Triton"].detail


def test_little_disk_and_memory_are_said(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2**30))
    monkeypatch.setattr(machine, "memory", lambda: (8.0, 1.0))
    found = lines()
    assert not found["disk"].ok
    assert not found["memory"].ok


def test_every_extra_that_is_named_exists():
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    named = set(re.findall(r"noisyssl\[(\w+)\]", Path(doctor.__file__).read_text()))
    named |= set(re.findall(r'_packages\([^)]*\), "(\w+)"', Path(doctor.__file__).read_text()))
    assert {"train", "onnx", "report", "rtx", "tensorrt", "dicom"} >= named - {"{extra}"}
    assert named <= set(extras["optional-dependencies"])


def test_the_command_exits_0_within_3_seconds_with_everything_missing(absent, monkeypatch):
    app = typer.Typer()
    app.command()(doctor.doctor)
    absent("torch", "nvidia", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "pytriton", "matplotlib")
    start = time.perf_counter()
    answer = CliRunner().invoke(app, ["--json"])
    assert time.perf_counter() - start < 3
    assert answer.exit_code == 0
    assert sum(not check["ok"] for check in json.loads(answer.stdout)["checks"]) >= 7
    plain = CliRunner().invoke(app, [])
    assert plain.exit_code == 0
    assert "-> pip install 'noisyssl[train]'" in plain.stdout


def test_doctor_needs_neither_torch_nor_dali():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['nvidia'] = None\n"
        "from noisyssl.cli import doctor; doctor.examine()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
