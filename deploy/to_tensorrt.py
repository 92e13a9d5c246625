"""One TensorRT engine from one ONNX file: parse, strongly typed, profile, build, proof of the precision.

`tensorrt` (10.13 or newer, 11.x) and `tensorrt_rtx` share this code. Precision is a property of the ONNX
file: nothing here converts. TF32, which TensorRT allows by default, is switched off: it rounds float32
to 10 bits of mantissa, and the parity that export proved would no longer hold.
"""

import hashlib
import importlib
import importlib.util
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from noisyssl.deploy import cuda_driver, proof
from noisyssl.deploy.bundle import save
from noisyssl.deploy.onnx_scan import self_contained
from noisyssl.disk import write_whole
from noisyssl.errors import ConfigError, MachineError, near_miss, pick

FLAVOURS = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}
EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "rtx"}
RTX = ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121")
"""What TensorRT for RTX 1.7 builds for; the installed version's own list decides."""
Profile = tuple[int, int, int]
"""Smallest, usual and largest batch."""


def flavours() -> list[str]:
    """The installed ones of FLAVOURS."""
    return [name for name in FLAVOURS if importlib.util.find_spec(name)]


def load(flavour: str) -> Any:
    """The module of `flavour`.

    Raises:
        MachineError: it is missing or cannot be loaded.
    """
    try:
        return importlib.import_module(flavour)
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MachineError(
            f"package {flavour!r} cannot be loaded ({reason}); {FLAVOURS[flavour]} needs it. "
            f"Run `pip install 'noisyssl[{EXTRAS[flavour]}]'`."
        ) from None


def choose(capabilities: Sequence[str], flavour: str = "auto") -> str:
    """The flavour that can build for `capabilities` on this machine.

    `auto` takes `tensorrt` where it is installed and finds the GPU that is asked for (or any, if
    nothing is), else `tensorrt_rtx`, which needs no GPU to build.

    Raises:
        ConfigError: unknown flavour or capability.
        MachineError: no flavour is installed, or `tensorrt` finds no such GPU.
    """
    for name in capabilities:
        if not re.fullmatch(r"SM\d{2,3}", name):
            raise ConfigError(
                f"compute capability {name!r} is unknown; write SM and digits, such as {', '.join(RTX)}."
                f"{near_miss(name.upper(), RTX)}"
            )
    if flavour != "auto":
        pick(FLAVOURS, flavour, "TensorRT flavour")
    here = flavours() if flavour == "auto" else [flavour]
    if not here:
        raise MachineError(
            "neither tensorrt nor tensorrt_rtx is installed; an engine needs one. "
            "Run `pip install 'noisyssl[rtx]'`, or leave --tensorrt out."
        )
    if "tensorrt" in here:
        gpu = cuda_driver.capability()
        if gpu and set(capabilities) <= {gpu}:
            return "tensorrt"
        if "tensorrt_rtx" not in here:
            found = f"this machine has {gpu}" if gpu else "this machine has no usable GPU"
            raise MachineError(
                f"TensorRT builds only for the GPU it runs on and {found}; asked is "
                f"{','.join(capabilities) or 'an engine'}. Build on the target, or, for RTX cards, "
                "anywhere: `pip install 'noisyssl[rtx]'` and flavour tensorrt_rtx."
            )
    trt = load("tensorrt_rtx")
    known = [name for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    for name in capabilities:
        if name not in known:
            raise ConfigError(
                f"compute capability {name!r} is no target of TensorRT for RTX {trt.__version__}; choose "
                f"from {', '.join(known)}.{near_miss(name, known)} Other GPUs need `tensorrt` on the target."
            )
    return "tensorrt_rtx"


def build(
    onnx_path: Path, plan_path: Path, *, capabilities: Sequence[str] = (), profile: Profile = (1, 8, 64),
    flavour: str = "auto", precision: str | None = None, timing_cache: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The sidecar of a new engine: writes the raw plan to `plan_path` and this beside it as `NAME.plan.json`.

    Without `capabilities`, `tensorrt` builds for the GPU that is here and `tensorrt_rtx` for SM80, SM86,
    SM89 and SM120.

    Args:
        precision: fp32, fp16 or int8, which the engine must have; any by default.
        timing_cache: file in which `tensorrt` keeps what it measured, read and then written; one of another
            GPU or version is ignored. `tensorrt_rtx` measures nothing.

    Raises:
        ConfigError: the profile, a capability or the flavour is wrong.
        MachineError: the flavour is missing, or TensorRT refuses; its own words are in the message.
        ExportError: the engine would not have the precision that is asked for.
        BundleError: the ONNX file is none, or needs other files.
    """
    smallest, usual, largest = profile
    if not 1 <= smallest <= usual <= largest:
        raise ConfigError(
            f"TensorRT profile is {','.join(map(str, profile))}; it must be smallest,usual,largest batch, "
            "rising from 1. Write 1,8,64."
        )
    flavour = choose(capabilities, flavour)
    trt = load(flavour)
    if flavour == "tensorrt":
        capabilities = [cuda_driver.capability() or ""]
    capabilities = list(dict.fromkeys(capabilities)) or ["SM80", "SM86", "SM89", "SM120"]
    data = onnx_path.read_bytes()
    self_contained(data, onnx_path)  # TensorRT's parser would follow it out of the bundle
    log = logger(trt)
    title = f"{FLAVOURS[flavour]} {trt.__version__}"

    def refuse(what: str) -> MachineError:
        reason = log.errors[0] if log.errors else "it gives no reason"
        return MachineError(f"{title} {what} {onnx_path.name} for {','.join(capabilities)}: {reason}.")

    builder = trt.Builder(log)
    if builder is None:
        raise refuse("cannot start to build")
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # TensorRT 11: always
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(data):
        if not log.errors and parser.num_errors:
            log.errors.append(parser.get_error(0).desc())
        raise refuse("cannot parse")
    found, types = proof.of_network(network)
    proof.must_be(precision or found, found, None)
    if flavour == "tensorrt_rtx" and found == "fp32" and "SM75" in capabilities:
        raise ConfigError(
            "compute capability SM75 is asked for an FP32 engine; TensorRT for RTX has no FP32 matrix "
            "multiplication on Turing. Leave SM75 out of --tensorrt."
        )
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for the inspector; costs no speed
    image = network.get_input(0)
    shapes = builder.create_optimization_profile()
    shapes.set_shape(image.name, *((batch, *tuple(image.shape)[1:]) for batch in profile))
    config.add_optimization_profile(shapes)
    if flavour == "tensorrt_rtx":
        config.num_compute_capabilities = len(capabilities)
        for i, name in enumerate(capabilities):
            config.set_compute_capability(trt.ComputeCapability.__members__[name], i)
    elif timing_cache:
        timings = _timings(config, timing_cache)
    start = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - start
    if plan is None:
        raise refuse("cannot build")
    raw = bytes(plan)
    inspected = proof.of_plan(trt, log, raw) if cuda_driver.capability() in capabilities else None
    proof.must_be(precision or found, found, inspected)
    if flavour == "tensorrt" and timing_cache:
        write_whole(timing_cache, bytes(timings.serialize()))
    sidecar = {
        "flavour": flavour,
        "version": str(trt.__version__),
        "compute_capabilities": capabilities,
        "profile": {"min": smallest, "opt": usual, "max": largest},
        "precision": found,
        "layer_types": types,
        "inspected": inspected,
        "tf32": bool(config.get_flag(trt.BuilderFlag.TF32)),
        "onnx": onnx_path.name,
        "onnx_sha256": hashlib.sha256(data).hexdigest(),
        "plan_sha256": hashlib.sha256(raw).hexdigest(),
        "bytes": len(raw),
        "build_s": round(seconds, 3),
    }
    save(plan_path, raw)
    save(plan_path.with_name(f"{plan_path.name}.json"), (json.dumps(sidecar, indent=2) + "\n").encode())
    return sidecar


def equal_command(
    onnx_name: str, plan_name: str, *, size: int, profile: Profile, flavour: str, capabilities: Sequence[str]
) -> str:
    """The line that builds the same engine with NVIDIA's own tool, on a machine without noisyssl.

    `--stronglyTyped` is needed before TensorRT 11, which knows nothing else.
    """
    shapes = " ".join(
        f"--{which}Shapes=image:{batch}x{size}x{size}x3"
        for which, batch in zip(("min", "opt", "max"), profile, strict=True)
    )
    if flavour == "tensorrt":
        return (
            f"trtexec --onnx={onnx_name} --saveEngine={plan_name} {shapes} --stronglyTyped --noTF32 "
            "--skipInference"
        )
    numbers = ",".join(name.removeprefix("SM") for name in capabilities)
    return (
        f"tensorrt_rtx --onnx={onnx_name} --saveEngine={plan_name} {shapes} --noTF32 "
        f"--computeCapabilities={numbers} --skipInference"
    )


def _timings(config: Any, path: Path) -> Any:
    """The timing cache of `path`, attached to `config`; an empty one where it does not fit."""
    known = path.read_bytes() if path.is_file() else b""
    timings = config.create_timing_cache(known)
    if timings is None or not config.set_timing_cache(timings, False):
        timings = config.create_timing_cache(b"")
        config.set_timing_cache(timings, False)
    return timings


def logger(trt: Any) -> Any:
    """A TensorRT logger that prints nothing and keeps errors, one line each, in `errors`."""

    class Collected(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(" ".join(message.split()).rstrip("."))

    return Collected()
