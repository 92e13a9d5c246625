"""The wheel holds exactly the package, and `pyproject.toml` names every folder of it."""

import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_with_an_init_is_a_listed_package():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    found = set()
    for package, folder in PROJECT["tool"]["setuptools"]["package-dir"].items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([package, *init.parent.relative_to(ROOT / folder).parts]))
    assert listed == found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    return next(folder.glob("noisyssl-*.whl"))


def test_the_wheel_holds_only_noisyssl(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {"noisyssl"}
    for needed in (
        "py.typed",
        "recipes/demo.toml",
        "benchmarks/report.html",
        "pipelines/fit.py",
        "cli/data.py",
    ):
        assert f"noisyssl/{needed}" in names
    assert not [name for name in names if "tests/" in name or "results/" in name]


def test_constraints_pin_every_dependency_without_addresses():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {line.split("==")[0].lower().replace("_", "-") for line in lines if not line.startswith("#")}
    assert all(line.startswith("#") or "==" in line for line in lines)
    assert not [line for line in lines if "://" in line or "@" in line]
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [
        *PROJECT["project"]["dependencies"],
        *(d for k in ("train", "onnx", "rtx", "report", "dev") for d in extras[k]),
    ]
    names = {name.split(";")[0].split(">")[0].split("<")[0].strip().lower() for name in wanted}
    assert names <= pins, names - pins


def test_help_answers_at_once():
    def seconds():
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "noisyssl.cli", "--help"], check=True, capture_output=True)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.5
