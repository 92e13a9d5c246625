"""What this machine is: hardware and versions for records, nothing that names a person or a host."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = (
    "noisyssl",
    "numpy",
    "pillow",
    "torch",
    "torchvision",
    "scikit-learn",
    "nvidia-dali-cuda130",
    "onnx",
    "onnxscript",
    "onnxruntime-gpu",
    "onnxruntime",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "nvidia-pytriton",
    "tritonclient",
)
"""Distributions whose versions go with every measured number."""

INSTRUCTIONS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
)
"""CPU flags that decide how fast INT8 and BF16 run there."""

EXACT_INT8 = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"}
"""Instructions that add INT8 products in 32 bits."""

GPU_QUERY = ("name", "driver_version", "compute_cap", "memory.total", "power.limit", "clocks.max.sm")


def facts() -> dict[str, Any]:
    """Hardware as JSON values: {"cpu", "cores", "instructions", "memory_gib", "gpus", "system", "python"}.

    `cores` are the ones this process may use. No host name, user name or path.
    """
    cpu = _fields(_text("/proc/cpuinfo"))
    return {
        "cpu": cpu.get("model name") or platform.machine(),
        "cores": cores(),
        "instructions": instructions(),
        "memory_gib": round(memory()[0], 1),
        "gpus": gpus(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def int8_saturates() -> bool:
    """Whether sums of unsigned times signed INT8 products can overflow on this CPU: x86 without VNNI.

    AVX2 adds two products in 16 bits before it widens: 2 x 255 x 127 does not fit, 2 x 255 x 64 does.
    """
    return not EXACT_INT8.intersection(instructions())


def instructions() -> list[str]:
    """Those of INSTRUCTIONS that this CPU has."""
    cpu = _fields(_text("/proc/cpuinfo"))
    flags = cpu.get("flags", cpu.get("Features", "")).split()
    return [name for name in INSTRUCTIONS if name in flags]


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Version of each installed distribution, without importing any."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> tuple[float, float]:
    """GiB of memory (total, available); within a container's limit where it has one. Zeros where unknown."""
    info = _fields(_text("/proc/meminfo"))
    total, free = (float(info.get(name, "0").split()[0]) / 2**20 for name in ("MemTotal", "MemAvailable"))
    limit, used = (_text(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    if limit.isdigit() and used.isdigit():
        total = min(total, int(limit) / 2**30)
        free = min(free, (int(limit) - int(used)) / 2**30)
    return total, free


def gpus(timeout_s: float = 5.0) -> list[dict[str, Any]]:
    """Per GPU {"name", "driver", "capability", "memory_gib", "power_w", "clock_mhz"}, as the driver says.

    Asks `nvidia-smi`; empty where there is none or it does not answer. A value it does not know is None.
    """
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines()]
    return [
        {
            "name": name,
            "driver": driver,
            "capability": capability,
            "memory_gib": _number(mib, 1 / 1024),
            "power_w": _number(watts),
            "clock_mhz": _number(mhz),
        }
        for name, driver, capability, mib, watts, mhz in (row for row in rows if len(row) == len(GPU_QUERY))
    ]


def _number(text: str, scale: float = 1.0) -> float | None:
    try:
        return round(float(text) * scale, 1)
    except ValueError:
        return None  # "[N/A]" on cards without that sensor


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _fields(text: str) -> dict[str, str]:
    """The first "name: value" of each name."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            found.setdefault(name.strip(), value.strip())
    return found
