"""The TensorRT engines of a bundle: one plan per precision, and a new bundle that has more of them."""

import json
import platform
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from noisyssl import machine
from noisyssl.deploy import bundle, to_tensorrt
from noisyssl.deploy.bundle import FORMS, PRECISIONS, Manifest
from noisyssl.deploy.draft import digests, draft_of, must_be_new
from noisyssl.errors import ConfigError, pick

ENGINE_FORMS = {"fp32": "fp32", "fp16": "fp16", "int8": "int8-trt"}
"""Which form of the ONNX file the engine of each precision is built from."""


def build(
    folder: Path,
    precisions: Sequence[str],
    *,
    size: int,
    capabilities: Sequence[str],
    profile: to_tensorrt.Profile,
    flavour: str,
    timing_cache: Path | None = None,
) -> list[dict[str, Any]]:
    """The sidecars of new engines below `folder`, one for each of `precisions` whose ONNX file is there.

    FP32 leaves SM75 to the other precisions: TensorRT for RTX has no FP32 matrix product for it.

    Raises:
        ConfigError, ExportError, MachineError: as `to_tensorrt.build`.
    """
    (folder / "engines").mkdir(exist_ok=True)
    there = [p for p in precisions if (folder / FORMS[ENGINE_FORMS[p]]).is_file()]
    sidecars = []
    for precision in there:
        wanted = list(capabilities)
        if precision == "fp32" and flavour == "tensorrt_rtx" and there != ["fp32"] and "SM75" in wanted:
            wanted.remove("SM75")
            if not wanted:
                continue
        plan = _name(folder, precision, flavour, wanted)
        plan.unlink(missing_ok=True)
        plan.with_name(f"{plan.name}.json").unlink(missing_ok=True)
        onnx_name = FORMS[ENGINE_FORMS[precision]]
        sidecar = to_tensorrt.build(
            folder / onnx_name, plan, capabilities=wanted, profile=profile, flavour=flavour,
            precision=precision, timing_cache=timing_cache,
        )  # fmt: skip
        command = to_tensorrt.equal_command(
            onnx_name, plan.name, size=size, profile=profile, flavour=flavour,
            capabilities=sidecar["compute_capabilities"],
        )  # fmt: skip
        sidecars.append({"name": f"engines/{plan.name}", "command": command, **sidecar})
    return sidecars


def add(
    source: Path,
    out: Path,
    *,
    precisions: Sequence[str] = (),
    capabilities: Sequence[str] = (),
    profile: to_tensorrt.Profile = (1, 8, 64),
    flavour: str = "auto",
    timing_cache: Path | None = None,
) -> tuple[Manifest, list[dict[str, Any]]]:
    """(manifest, new sidecars) of the bundle `out`: all that `source` has, and more engines.

    Without `precisions`, every precision that `source` has gets one.

    Raises:
        BundleError: `source` is altered, its ONNX needs other files, or it lacks a precision that is asked.
        ConfigError, ExportError, MachineError: as `to_tensorrt.build`; nothing is left behind.
    """
    must_be_new(out)
    manifest = bundle.read(source)
    if out.absolute().is_relative_to(source.absolute()):
        raise ConfigError(f"{out} lies in {source}, which is never written into; name a folder outside it.")
    for precision in precisions:
        pick(dict.fromkeys(PRECISIONS), precision, "precision")
        bundle.model_file(source, manifest, ENGINE_FORMS[precision])
    flavour = to_tensorrt.choose(capabilities, flavour)
    with draft_of(out) as draft:
        (draft / "engines").mkdir()
        for name in manifest.files:
            bundle.save(draft / name, bundle.content(source, manifest, name))
        sidecars = build(
            draft, precisions or PRECISIONS, size=manifest.input.size, capabilities=capabilities,
            profile=profile, flavour=flavour, timing_cache=timing_cache,
        )  # fmt: skip
        tools = manifest.tools | machine.versions() | {"python": platform.python_version()}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        manifest = replace(manifest, files=digests(draft), tools=tools, created=now)
        bundle.write(draft, manifest)
    return manifest, sidecars


def sidecars_of(folder: Path, manifest: Manifest) -> dict[str, dict[str, Any]]:
    """What stands beside each plan of a bundle, by the plan's name."""
    plans = (name for name in sorted(manifest.files) if name.endswith(".plan"))
    return {name: json.loads(bundle.content(folder, manifest, f"{name}.json")) for name in plans}


def _name(folder: Path, precision: str, flavour: str, capabilities: Sequence[str]) -> Path:
    """The path of a new plan; where one of that flavour exists, its own targets tell it apart."""
    parts = ["model"] + ([precision] if precision != "fp32" else []) + [flavour]
    plain = folder / "engines" / ".".join([*parts, "plan"])
    if not plain.exists():
        return plain
    targets = "-".join(capabilities) or "here"
    return folder / "engines" / ".".join([*parts, targets, "plan"])
