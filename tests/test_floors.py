"""Imports point downwards only. A file's floor is the last rule that matches it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "noisyssl": "toolkit",
    "noisyssl.pipelines": "pipelines",
    "noisyssl.deploy": "deploy",
    "noisyssl.benchmarks": "benchmarks",
}
FLOORS = {
    "noisyssl": 1,  # the toolkit: what is computed
    "noisyssl.errors": 0,  # standard library only
    "noisyssl.pipelines": 2,  # data and the two stages
    "noisyssl.deploy": 2,  # artefacts and runtimes; never imports pipelines
    "noisyssl.benchmarks": 3,
    "noisyssl.cli": 4,
}


def floor(module: str) -> tuple[int, str]:
    rule = max((name for name in FLOORS if f"{module}.".startswith(f"{name}.")), key=len)
    return FLOORS[rule], rule


def files():
    for package, folder in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            module = ".".join(part for part in parts if part != "__init__")
            yield pytest.param(module, path, id=str(path.relative_to(ROOT)))


def imported(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize(("module", "path"), [*files()])
def test_imports_point_down(module, path):
    here, own = floor(module)
    for name in imported(path):
        if name.startswith("noisyssl"):
            there, other = floor(name)
            assert there < here or own == other, f"{module} (floor {here}) imports {name} (floor {there})"
        if here == 0:
            assert name.split(".")[0] in sys.stdlib_module_names, f"{module} imports {name}"


@pytest.mark.parametrize(("module", "path"), [*files()])
def test_files_are_short(module, path):
    assert len(path.read_text().splitlines()) <= 300


def test_the_command_line_and_the_serving_half_need_neither_torch_nor_dali():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['nvidia.dali'] = sys.modules['sklearn'] = None\n"
        "import noisyssl.cli, noisyssl.images, noisyssl.evaluation, noisyssl.machine\n"
        "import noisyssl.deploy.bundle, noisyssl.deploy.runtime, noisyssl.deploy.predict\n"
        "import noisyssl.deploy.run_onnx\n"
        "import noisyssl.deploy.run_tensorrt, noisyssl.deploy.to_tensorrt\n"
        "import noisyssl.deploy.triton_repository, noisyssl.deploy.triton_server\n"
        "import noisyssl.deploy.triton_parity\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("folder", PACKAGES.values())
def test_a_folder_cannot_be_imported_by_its_own_name(folder):
    done = subprocess.run(
        [sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "pip install -e ." in done.stderr


REFUSED = ("pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal")


@pytest.mark.parametrize(("module", "path"), [*files()])
def test_nothing_runs_foreign_code(module, path):
    """No pickle, eval, exec, shell, unsafe torch.load or np.load in the package."""
    assert not [name for name in imported(path) if name.split(".")[0] in REFUSED]
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert name not in ("eval", "exec", "os.system", "os.popen", "yaml.load"), f"{path}: {name}"
        assert given.get("shell") in (None, "False"), f"{path}: shell"
        assert given.get("allow_pickle") in (None, "False"), f"{path}: allow_pickle"
        if name == "torch.load":
            assert given.get("weights_only") == "True", f"{path}: torch.load"
