"""Question "engines": how long TensorRT for RTX builds the engines of each precision, and how large they are.

It builds for GPUs that are not here; see docs/deploy.md for what has run on one.
"""

import tempfile
import time
from pathlib import Path

from noisyssl.benchmarks.inference import random_bundle
from noisyssl.benchmarks.records import Record, record
from noisyssl.deploy import engines
from noisyssl.deploy.bundle import read

TARGETS = ("SM75", "SM80", "SM86", "SM89", "SM120")
"""Turing to Blackwell; FP32 leaves SM75 out."""


def measure(bundle: Path | None = None, backbone: str = "resnet18", size: int = 224) -> Record:
    """One record: MB, seconds and targets of the engine of each precision of a bundle, and the total seconds.

    Without a bundle, of a classifier with random weights: building does not depend on them.

    Raises:
        MachineError: TensorRT for RTX is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        if bundle is None:
            bundle = Path(folder) / "bundle"
            random_bundle(bundle, backbone, size)
        manifest = read(bundle)
        start = time.perf_counter()
        _, sidecars = engines.add(bundle, Path(folder) / "more", capabilities=TARGETS, flavour="tensorrt_rtx")
        seconds = time.perf_counter() - start
    return record(
        "engines",
        settings={
            "backbone": manifest.architecture.backbone,
            "size": manifest.geometry.size,
            "weights": manifest.checkpoint["which"],
            "TensorRT for RTX": sidecars[0]["version"],
            "largest batch": sidecars[0]["profile"]["max"],
            "total, s": round(seconds, 2),
        },
        figures={
            one["precision"]: {
                "targets": len(one["compute_capabilities"]),
                "for": ", ".join(one["compute_capabilities"]),
                "MB": one["bytes"] / 1e6,
                "build, s": one["build_s"],
                "products": ", ".join(
                    f"{count} {name.lower()}" for name, count in one["layer_types"].items()
                ),
            }
            for one in sidecars
        },
        n=1,
    )
