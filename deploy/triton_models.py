"""What of a bundle Triton can serve: the files of one version of each model, and why others are left out."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from noisyssl.deploy import bundle
from noisyssl.deploy.bundle import ONNX, Manifest
from noisyssl.deploy.onnx_scan import self_contained
from noisyssl.errors import ConfigError, pick

FILES: Mapping[str, str] = {
    "fp32": ONNX,
    "fp16": "model.fp16.onnx",
    "int8": "model.int8-cpu.onnx",
    "int8-trt": "model.int8-trt.onnx",
}
"""--precision to the bundle's file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """One version of a repository's models, in memory and verified."""

    facts: dict[str, Any]
    """What all versions of a repository share: classes, size, batch."""
    files: dict[str, dict[str, bytes]]
    """Backend to its files."""
    about: dict[str, Any]
    """What is particular to this version; goes into the repository's record."""
    left_out: list[str] = field(default_factory=list)
    """One sentence per thing of the bundle that is not served."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The backends."""
        return tuple(self.files)


def version(folder: Path, *, precision: str = "fp32", batch: int = 64, threads: int = 0) -> Version:
    """The ONNX variant of the bundle in `folder`, and a TensorRT variant where it has classic plans.

    `threads` is how many of the CPU one run of the ONNX file takes; 0 for one per core.

    Raises:
        ConfigError: unknown precision, or the bundle has no file of it.
        BundleError: the bundle was altered; nothing has been copied.
    """
    if not 1 <= batch <= 1024:
        raise ConfigError(f"--batch is {batch}; it must lie in 1-1024.")
    if not 0 <= threads <= 1024:
        raise ConfigError(f"--threads is {threads}; it must lie in 1-1024, or be 0 for one per core.")
    file = pick(FILES, precision, "--precision")
    manifest = bundle.read(folder)
    if file not in manifest.files:
        known = [name for name, other in FILES.items() if other in manifest.files]
        raise ConfigError(
            f"--precision is {precision}, but {folder} has no {file}; it has {', '.join(known)}. "
            "Choose one of those, or export the bundle with it."
        )
    plans, smallest, left_out = classic_plans(folder, manifest, precision)
    graph = bundle.content(folder, manifest, file)
    self_contained(graph, folder / file)
    if precision == "int8" and not manifest.precisions.get("int8-cpu", {}).get("reduced_range"):
        left_out.append(
            "int8 of this bundle computes wrong sums on a server CPU without VNNI: compare its answers there."
        )
    files = {"onnxruntime": {"model.onnx": graph}}
    if plans:
        if smallest < batch:
            raise ConfigError(
                f"--batch is {batch}; the bundle's TensorRT plans take at most {smallest}. "
                f"Use --batch {smallest}, or build plans with a larger profile."
            )
        files["tensorrt"] = {
            _plan_file(capability): bundle.content(folder, manifest, name)
            for capability, name in plans.items()
        }
    return Version(
        facts={
            "classes": list(manifest.classes),
            "size": manifest.geometry.size,
            "batch": batch,
        },
        files=files,
        about={
            "bundle": bundle_digest(folder),
            "fit": manifest.geometry.fit,
            "precision": precision,
            "threads": threads,
            "plans": {capability: _plan_file(capability) for capability in plans},
            "dali": None,
        },
        left_out=left_out,
    )


def with_ensemble(plain: Version, graph: bytes, parity: Mapping[str, Any]) -> Version:
    """`plain` with the DALI graph before the ONNX variant."""
    return Version(
        facts=plain.facts,
        files={
            **plain.files,
            "dali": {"model.dali": graph},
            "ensemble": {"README": b"Made of other models.\n"},
        },
        about={**plain.about, "dali": dict(parity)},
        left_out=plain.left_out,
    )


def classic_plans(folder: Path, manifest: Manifest, precision: str) -> tuple[dict[str, str], int, list[str]]:
    """(compute capability "8.6" to plan, largest batch that all of them take, what is left out and why).

    Triton's TensorRT backend deserialises with TensorRT itself: a plan of TensorRT for RTX is another format.
    """
    wanted = precision.partition("-")[0]
    plans: dict[str, str] = {}
    left_out, largest = [], []
    for name in sorted(manifest.files):
        if not name.endswith(".plan"):
            continue
        sidecar = _sidecar(folder, manifest, name)
        if sidecar.get("flavour") != "tensorrt":
            left_out.append(
                f"{name} is left out: it is for TensorRT for RTX, which Triton cannot load. A GPU server "
                "builds its own engine from the ONNX file, or build a plan with TensorRT on the target."
            )
        elif sidecar.get("precision") != wanted:
            left_out.append(
                f"{name} is left out: it is {sidecar.get('precision')}, --precision is {precision}."
            )
        else:
            largest.append(int(sidecar["profile"]["max"]))
            plans |= {_dotted(word): name for word in sidecar["compute_capabilities"]}
    return plans, min(largest, default=0), left_out


def _sidecar(folder: Path, manifest: Manifest, plan: str) -> dict[str, Any]:
    if f"{plan}.json" not in manifest.files:
        return {}
    found: dict[str, Any] = json.loads(bundle.content(folder, manifest, f"{plan}.json"))
    return found


def _dotted(capability: str) -> str:
    """SM86 -> 8.6, SM120 -> 12.0."""
    digits = capability.removeprefix("SM")
    return f"{digits[:-1]}.{digits[-1]}"


def _plan_file(capability: str) -> str:
    return f"model_cc{capability.replace('.', '')}.plan"


def bundle_digest(folder: Path) -> str:
    """The digest that a bundle's manifest gives itself; `bundle.read` has checked it."""
    return str(json.loads((folder / bundle.MANIFEST).read_bytes())["sha256"])
