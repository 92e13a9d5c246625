"""Where a `tritonserver` is, and what it needs to start without its container.

The wheel of nvidia-pytriton brings the server and its Python backend, but none for ONNX or DALI: for those
two stand in (`triton_backend_*`). What it takes, tried with servers 2.46 and 2.51:

- `LD_LIBRARY_PATH`: the folder of the running `libpythonX.Y.so` first (a library of another patch level fails
  inside the standard library), then the wheel's own libraries;
- `PATH`: the running interpreter's folder first: the stub is an isolated Python, which ignores PYTHONPATH and
  finds its packages from the first `python3`;
- the stub of the running minor version beside `libtriton_python.so`.
"""

import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from noisyssl.errors import MachineError

STAND_INS = {"onnxruntime": "onnxruntime", "dali": "nvidia.dali"}
"""Backend to the package that its stand-in runs on."""
EXTRA = "pip install 'noisyssl[triton]'"


@dataclass(frozen=True, kw_only=True, slots=True)
class Install:
    """A Triton server on this machine."""

    program: Path
    backends: Path
    stubs: Path | None
    """The wheel's stubs of the Python backend by version; None for a complete installation."""
    libraries: Path | None
    """The wheel's shared libraries."""


def find() -> Install:
    """The `tritonserver` on PATH, else the one in the wheel of nvidia-pytriton.

    Raises:
        MachineError: there is neither.
    """
    if path := shutil.which("tritonserver"):
        root = Path(path).resolve().parents[1]
        return Install(program=Path(path), backends=root / "backends", stubs=None, libraries=None)
    spec = importlib.util.find_spec("pytriton")
    for folder in (spec and spec.submodule_search_locations) or ():
        root = Path(folder) / "tritonserver"
        if (root / "bin" / "tritonserver").is_file():
            return Install(
                program=root / "bin" / "tritonserver",
                backends=root / "backends",
                stubs=root / "python_backend_stubs",
                libraries=Path(folder).parent / "nvidia_pytriton.libs",
            )
    raise MachineError(
        f"no tritonserver on PATH and none of nvidia-pytriton; run `{EXTRA}` (Linux on x86-64), or start the "
        "official container with the repository's launch.sh."
    )


def available(install: Install) -> set[str]:
    """The backends that this server can run here, its own and those that stand in."""
    own = {path.name for path in install.backends.glob("*") if path.is_dir()}
    if "python" in own:
        own |= {name for name, package in STAND_INS.items() if _has(package)}
    return own


def backend_directory(install: Install, folder: Path) -> Path:
    """The server's own backends where it has `onnxruntime`, else `folder`, filled with those that stand in.

    Raises:
        MachineError: there is no stub for this Python.
    """
    if (install.backends / "onnxruntime").is_dir():
        return install.backends
    shutil.copytree(install.backends / "python", folder / "python")
    if install.stubs is not None:
        stub = install.stubs / python_version() / "triton_python_backend_stub"
        if not stub.is_file():
            known = ", ".join(sorted(path.name for path in install.stubs.glob("*")))
            raise MachineError(
                f"the Triton of nvidia-pytriton has Python stubs for {known}, this is {python_version()}; "
                "use one of those, or the official container with the repository's launch.sh."
            )
        shutil.copy(stub, folder / "python" / stub.name)
        (folder / "python" / stub.name).chmod(0o755)
    for name, package in STAND_INS.items():
        if _has(package):
            (folder / name).mkdir()
            shutil.copy(Path(__file__).with_name(f"triton_backend_{name}.py"), folder / name / "model.py")
    return folder


def environment(install: Install) -> dict[str, str]:
    """The environment of the server: this process's, with what the module's docstring lists."""
    variables = dict(os.environ)
    if install.libraries is not None:
        folders = [*_libpython(), str(install.libraries), variables.get("LD_LIBRARY_PATH", "")]
        variables["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, folders))
        variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), variables.get("PATH", "")])
    return variables


def python_version() -> str:
    """Major and minor version of the running interpreter."""
    return ".".join(platform.python_version_tuple()[:2])


def _libpython() -> list[str]:
    """The folder of this interpreter's shared library, if it has one."""
    name = sysconfig.get_config_var("INSTSONAME") or ""
    places = [sysconfig.get_config_var("LIBDIR"), os.path.join(sys.base_prefix, "lib")]
    return [
        place for place in places if place and ".so" in name and os.path.exists(os.path.join(place, name))
    ][:1]


def _has(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False
