"""`noisyssl doctor`: what this machine can do, and the one command that adds what is missing."""

import importlib
import importlib.util
import json
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from noisyssl import machine

DISK_GIB, MEMORY_GIB = 10.0, 4.0
"""Below these, an installation (about 6 GiB) and a training run get tight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One line of the answer."""

    name: str
    ok: bool
    detail: str
    fix: str | None = None
    """The command that adds what is missing; None where it is there, or no command can add it."""


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say what this machine can do: GPU, DALI, ONNX Runtime, TensorRT, Triton, DICOM, disk, memory."""
    checks = examine()
    if as_json:
        answer = {"checks": [asdict(check) for check in checks], "machine": machine.facts()}
        typer.echo(json.dumps({**answer, "versions": machine.versions()}, indent=2))
        return
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = typer.style("ok     ", fg="green") if check.ok else typer.style("missing", fg="yellow")
        typer.echo(f"{mark}  {check.name:<{width}}  {check.detail}")
        if check.fix:
            typer.echo(f"{'':<{width + 9}}  -> {check.fix}")


def examine() -> list[Check]:
    """All checks, in the order of the work; none raises, whatever is missing or broken."""
    gpus = machine.gpus()
    return [
        _gpu(gpus),
        _packages("training", ("torch", "torchvision", "sklearn", "safetensors"), "train"),
        _packages("DALI", ("nvidia.dali",), "train", "images are decoded and augmented by DALI"),
        _packages("ONNX export", ("onnx", "onnxscript"), "onnx"),
        _onnxruntime(bool(gpus)),
        _tensorrt(gpus),
        _triton(),
        _packages("DICOM", ("pydicom", "pylibjpeg", "openjpeg", "jpeg_ls", "gdcm"), "dicom"),
        _packages("report", ("matplotlib", "jinja2"), "report"),
        _space(
            "disk", shutil.disk_usage(".").free / 2**30, DISK_GIB, "du -xh --max-depth=2 ~ | sort -h | tail"
        ),
        _space("memory", machine.memory()[1], MEMORY_GIB, "ps aux --sort=-rss | head"),
    ]


def _gpu(gpus: list[dict[str, Any]]) -> Check:
    if gpus:
        one = gpus[0]
        detail = (
            f"{len(gpus)} x {one['name']}, compute capability {one['capability']}, driver {one['driver']}"
        )
        return Check(name="GPU", ok=True, detail=detail)
    if not _nvidia_card():
        return Check(
            name="GPU", ok=False, detail="no NVIDIA GPU in this machine; everything runs on the CPU, slower"
        )
    command = "sudo ubuntu-drivers install" if _is_ubuntu() else "sudo apt-get install nvidia-driver"
    return Check(
        name="GPU", ok=False, detail="an NVIDIA GPU is here, but its driver does not answer", fix=command
    )


def _nvidia_card(devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether the PCI bus holds a display or 3D controller by NVIDIA."""
    for device in devices.glob("*"):
        try:
            vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text().strip()
        except OSError:
            continue
        if vendor == "0x10de" and kind.startswith("0x03"):
            return True
    return False


def _is_ubuntu() -> bool:
    try:
        return "ubuntu" in (system := platform.freedesktop_os_release())["ID"] + system.get("ID_LIKE", "")
    except OSError:
        return False


def _packages(name: str, modules: tuple[str, ...], extra: str, purpose: str = "") -> Check:
    missing = [module for module in modules if not _installed(module)]
    if missing:
        detail = f"{', '.join(missing)} not installed"
        return Check(name=name, ok=False, detail=detail, fix=f"pip install 'noisyssl[{extra}]'")
    return Check(name=name, ok=True, detail=_versions(*modules) + (f"; {purpose}" if purpose else ""))


def _onnxruntime(has_gpu: bool) -> Check:
    name, install = "ONNX Runtime", "pip install 'noisyssl[onnx]'"
    if not _installed("onnxruntime"):
        return Check(name=name, ok=False, detail="onnxruntime not installed", fix=install)
    try:  # only a real import shows the providers, and whether its libraries load
        providers = [one.removesuffix("ExecutionProvider") for one in _providers()]
    except (ImportError, AttributeError, OSError) as error:  # AttributeError: one of two wheels was removed
        why = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        repair = "pip install --force-reinstall --no-deps onnxruntime-gpu"
        return Check(name=name, ok=False, detail=f"installed, but does not load: {why}", fix=repair)
    detail = f"{_versions('onnxruntime')}; providers in this build: {', '.join(providers)}"
    if has_gpu and "CUDA" not in providers:
        return Check(name=name, ok=False, detail=f"{detail}; CUDA is not among them", fix=install)
    return Check(name=name, ok=True, detail=detail)


def _providers() -> list[str]:
    providers: Callable[[], list[str]] = importlib.import_module("onnxruntime").get_available_providers
    return providers()


def _tensorrt(gpus: list[dict[str, Any]]) -> Check:
    from noisyssl.deploy.to_tensorrt import FLAVOURS, RTX

    found = [module for module in FLAVOURS if _installed(module)]
    names = {gpu["capability"]: "SM" + gpu["capability"].replace(".", "") for gpu in gpus}
    foreign = [capability for capability, name in names.items() if name not in RTX]  # 9.0: H100, H200
    if not found:
        extra = "tensorrt" if foreign else "rtx"
        return Check(
            name="TensorRT", ok=False, detail="not installed", fix=f"pip install 'noisyssl[{extra}]'"
        )
    detail = ", ".join(f"{FLAVOURS[module]} {_version(module)}".strip() for module in found)
    if foreign and "tensorrt" not in found:
        detail += f"; it builds engines, but this GPU ({foreign[0]}) runs only those of TensorRT itself"
        return Check(name="TensorRT", ok=False, detail=detail, fix="pip install 'noisyssl[tensorrt]'")
    return Check(name="TensorRT", ok=True, detail=detail + ("" if gpus else "; engines run where a GPU is"))


def _triton() -> Check:
    if path := shutil.which("tritonserver"):
        return Check(name="Triton", ok=True, detail=f"tritonserver at {path}")
    spec = _spec("pytriton")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / "tritonserver" / "bin" / "tritonserver").exists():
            return Check(
                name="Triton", ok=True, detail=f"tritonserver of nvidia-pytriton {_version('pytriton')}"
            )
    command = "pip install nvidia-pytriton 'tritonclient[http,grpc]'"
    return Check(name="Triton", ok=False, detail="no tritonserver program (noisyssl needs none)", fix=command)


def _space(name: str, gib: float, enough: float, command: str) -> Check:
    low = gib < enough
    detail = f"{gib:.1f} GiB free" + (f"; {enough:.0f} GiB is comfortable" if low else "")
    return Check(name=name, ok=not low, detail=detail, fix=command if low else None)


def _spec(module: str) -> Any:
    parent = module.rpartition(".")[0]
    if parent and _spec(parent) is None:  # find_spec does not look where the module is imported already
        return None
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):  # the parent is missing, or a half-removed module
        return None


def _installed(module: str) -> bool:
    return _spec(module) is not None


DISTRIBUTIONS = {
    "sklearn": "scikit-learn",
    "nvidia.dali": "nvidia-dali-cuda130",
    "onnxruntime": "onnxruntime-gpu",
    "tensorrt_rtx": "tensorrt-rtx-cu13",
    "pytriton": "nvidia-pytriton",
    "openjpeg": "pylibjpeg-openjpeg",
    "jpeg_ls": "pyjpegls",
    "gdcm": "python-gdcm",
}


def _version(module: str) -> str:
    """The version of the distribution that brings `module`; empty where its metadata is not found."""
    names = (DISTRIBUTIONS.get(module, module), module)
    found = machine.versions(names)
    return next(iter(found.values()), "")


def _versions(*modules: str) -> str:
    return ", ".join(f"{DISTRIBUTIONS.get(module, module)} {_version(module)}".strip() for module in modules)
