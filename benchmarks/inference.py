"""Question "inference": images a second and latency of one classifier, by runtime and batch size.

All runtimes of one batch size take turns in one process with the same number of threads. Model alone on
bytes in memory, and from encoded file to label as `predict` does it.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from noisyssl.benchmarks.loading import jpegs
from noisyssl.benchmarks.measure import interleaved, rate, ratio
from noisyssl.benchmarks.records import Record, record
from noisyssl.classifier import Classifier, build_classifier
from noisyssl.deploy.bundle import Manifest, read
from noisyssl.deploy.export import export_bundle
from noisyssl.deploy.predict import predict
from noisyssl.deploy.runtime import open_runtime
from noisyssl.errors import MachineError

BATCHES = (1, 8, 32)
Side = Callable[[np.ndarray], Any]


def measure(
    bundle: Path | None = None, backbone: str = "resnet18", size: int = 224, threads: int = 2, runs: int = 15
) -> Iterator[Record]:
    """One record per batch size, one from file to label.

    Without a bundle, a classifier with random weights is exported first: speed does not depend on them.
    """
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # ONNX Runtime computes in float32 as well: see deploy.run_onnx
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        if bundle is None:
            bundle = Path(folder) / "bundle"
            random_bundle(bundle, backbone, size)
        manifest = read(bundle)
        sides = runtimes(bundle, manifest, threads, stack)
        for batch in BATCHES:
            yield alone(manifest, sides, batch, threads, runs * max(1, 32 // batch // 3))
        yield from_files(bundle, manifest, Path(folder) / "images", threads)


def random_bundle(out: Path, backbone: str, size: int) -> None:
    """A bundle of an untrained classifier with nine classes."""
    torch.manual_seed(0)
    images = np.random.default_rng(0).integers(0, 256, (32, size, size, 3), dtype=np.uint8)
    export_bundle(
        out, classifier=build_classifier(backbone, "plain", 9), classes=[f"class {i}" for i in range(9)],
        architecture={"backbone": backbone, "stem": "plain"}, size=size, fit="crop",
        images=lambda: [images],
        figures={}, training={}, checkpoint={"which": "random", "epoch": 0}, tensorrt=None,
    )  # fmt: skip


def runtimes(bundle: Path, manifest: Manifest, threads: int, stack: ExitStack) -> dict[str, Side]:
    """Every runtime of this machine: torch eager in both layouts, ONNX Runtime, TensorRT if it runs."""
    sides: dict[str, Side] = {
        "torch eager": eager(bundle, manifest, torch.contiguous_format),
        "torch channels-last": eager(bundle, manifest, torch.channels_last),
        "ONNX Runtime": stack.enter_context(open_runtime(bundle, "onnx", threads=threads)).logits,
    }
    try:
        sides["TensorRT"] = stack.enter_context(open_runtime(bundle, "tensorrt")).logits
    except MachineError:
        pass  # no GPU its flavour supports: the record lists the runtimes that ran
    return sides


def eager(bundle: Path, manifest: Manifest, layout: torch.memory_format) -> Side:
    """The unfolded classifier of a bundle in PyTorch, (B, S, S, 3) bytes in, logits out."""
    from safetensors.torch import load_file

    classifier: Classifier = build_classifier(
        manifest.architecture.backbone, manifest.architecture.stem, len(manifest.classes)
    )
    classifier.load_state_dict(load_file(bundle / "model.safetensors"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier.eval().to(device, memory_format=layout)  # type: ignore[call-overload]

    @torch.inference_mode()
    def logits(images: np.ndarray) -> np.ndarray:
        batch = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).contiguous(memory_format=layout)
        return classifier(batch).cpu().numpy()

    return logits


def alone(manifest: Manifest, sides: dict[str, Side], batch: int, threads: int, runs: int) -> Record:
    """The model on images in memory."""
    size = manifest.geometry.size
    images = np.random.default_rng(1).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    expected = sides["torch eager"](images)
    for name, side in sides.items():
        assert np.abs(side(images) - expected).max() < 1e-2, f"{name} computes something else"
    calls = {name: partial(side, images) for name, side in sides.items()}
    seconds = interleaved(calls, warm=3, runs=runs)
    figures = {
        name: {
            "images/s": rate(batch, values).median,
            **{f"p{q} ms": 1e3 * float(np.percentile(values, q)) for q in (50, 95, 99)},
            "times torch eager": ratio(seconds["torch eager"], values).median,
        }
        for name, values in seconds.items()
    }
    spread = {
        f"{name}.times torch eager": ratio(seconds["torch eager"], values) for name, values in seconds.items()
    }
    return record(
        "inference",
        settings=_settings(manifest, batch, threads, "model"),
        figures=figures,
        n=runs,
        spread=spread,
    )


def from_files(
    bundle: Path, manifest: Manifest, folder: Path, threads: int, batch: int = 32, runs: int = 5
) -> Record:
    """From encoded JPEG files (224 pixels) to labels, as `noisyssl predict` does it."""
    files = jpegs(folder, 128)
    items = [(path, files.root / path) for path in files.paths]
    with open_runtime(bundle, "onnx", threads=threads) as runtime:
        images = np.zeros((batch, manifest.geometry.size, manifest.geometry.size, 3), dtype=np.uint8)

        def model() -> None:
            for _ in range(0, len(items), batch):
                runtime.logits(images)

        def whole() -> None:
            for _ in predict(runtime, items, batch=batch, threads=threads):
                pass

        seconds = interleaved({"file to label": whole, "model alone": model}, warm=1, runs=runs)
    share = ratio(seconds["model alone"], seconds["file to label"])
    figures = {f"{name} images/s": rate(len(items), values).median for name, values in seconds.items()}
    return record(
        "inference",
        settings=_settings(manifest, batch, threads, "file to label, ONNX Runtime"),
        figures=figures | {"share of the model's speed": share.median},
        n=runs,
        spread={"share of the model's speed": share},
    )


def _settings(manifest: Manifest, batch: int, threads: int, case: str) -> dict[str, Any]:
    size = manifest.geometry.size
    return {
        "case": case,
        "backbone": manifest.architecture.backbone,
        "size": size,
        "batch": batch,
        "threads": threads,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
