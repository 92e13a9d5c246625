"""Question "inference": images a second and latency of one classifier, by runtime and batch size.

All runtimes of one batch size take turns in one process with the same number of threads. Model alone on
bytes in memory, from encoded file to label as `predict` does it, and the precisions of ONNX Runtime on the
CPU beside the accuracy that their gates measured.
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
from noisyssl.benchmarks.measure import as_in_training, interleaved, rate, ratio
from noisyssl.benchmarks.records import Record, record
from noisyssl.classifier import Classifier, build_classifier
from noisyssl.deploy.bundle import FORMS, PRECISIONS, Manifest, read
from noisyssl.deploy.export import export_bundle
from noisyssl.deploy.gates import Gates
from noisyssl.deploy.predict import predict
from noisyssl.deploy.runtime import open_runtime
from noisyssl.errors import BundleError, MachineError
from noisyssl.machine import int8_saturates

BATCHES = (1, 8, 32)
GOALS = {True: 2.0, False: 1.2}
"""INT8 / FP32 images a second that are wanted of a CPU with VNNI (or its like), and without."""
Side = Callable[[np.ndarray], Any]


def measure(
    bundle: Path | None = None, backbone: str = "resnet18", size: int = 224, threads: int = 2, runs: int = 15
) -> Iterator[Record]:
    """One record per batch size, one from file to label, one of the precisions of the bundle at batch 8.

    Without a bundle, a classifier with random weights is exported first: speed does not depend on them, and
    no accuracy is stated.
    """
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stack.enter_context(as_in_training())
        torch.backends.cudnn.allow_tf32 = False  # ONNX Runtime computes in float32 too: see deploy.run_onnx
        if bundle is None:
            bundle = Path(folder) / "bundle"
            random_bundle(bundle, backbone, size)
        manifest = read(bundle)
        sides = runtimes(bundle, manifest, threads, stack)
        for batch in BATCHES:
            yield alone(manifest, sides, batch, threads, runs * max(1, 32 // batch // 3))
        yield from_files(bundle, manifest, Path(folder) / "images", threads)
        if len(manifest.precisions) > 1:
            yield precisions(bundle, manifest, threads, runs, stack)


def random_bundle(out: Path, backbone: str, size: int) -> None:
    """A bundle of an untrained classifier with nine classes, in all precisions, whatever they change."""
    torch.manual_seed(0)
    images = np.random.default_rng(0).integers(0, 256, (32, size, size, 3), dtype=np.uint8)
    export_bundle(
        out, classifier=build_classifier(backbone, "plain", 9), classes=[f"class {i}" for i in range(9)],
        architecture={"backbone": backbone, "stem": "plain"}, size=size, fit="crop",
        images=lambda: [images],
        figures={}, training={}, checkpoint={"which": "random", "epoch": 0}, tensorrt=None,
        precisions=PRECISIONS, calibration=lambda: [images], reduced=int8_saturates(),
        gates=Gates(fp16_flips=1, int8_agreement=0, int8_auroc_drop=1),
    )  # fmt: skip


def runtimes(bundle: Path, manifest: Manifest, threads: int, stack: ExitStack) -> dict[str, Side]:
    """Every runtime of this machine: torch eager in both layouts, ONNX Runtime, TensorRT if it runs."""
    sides: dict[str, Side] = {
        "torch eager": eager(bundle, manifest, torch.contiguous_format),
        "torch channels-last": eager(bundle, manifest, torch.channels_last),
        "ONNX Runtime": stack.enter_context(open_runtime(bundle, "onnx", device_name(), threads)).logits,
    }
    try:
        sides["TensorRT"] = stack.enter_context(open_runtime(bundle, "tensorrt")).logits
    except (MachineError, BundleError):
        pass  # no GPU, or none that an engine of the bundle is for: the record lists the runtimes that ran
    return sides


def eager(bundle: Path, manifest: Manifest, layout: torch.memory_format) -> Side:
    """The unfolded classifier of a bundle in PyTorch, (B, S, S, 3) bytes in, logits out."""
    from safetensors.torch import load_file

    classifier: Classifier = build_classifier(
        manifest.architecture.backbone, manifest.architecture.stem, len(manifest.classes)
    )
    classifier.load_state_dict(load_file(bundle / "model.safetensors"))
    device = torch.device(device_name())
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
    with open_runtime(bundle, "onnx", device_name(), threads) as runtime:
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


def precisions(
    bundle: Path, manifest: Manifest, threads: int, runs: int, stack: ExitStack, batch: int = 8
) -> Record:
    """FP32, FP16 and INT8 in ONNX Runtime on this CPU, taking turns, with what each one's gate measured."""
    forms = {"fp32": "fp32", "fp16": "fp16", "int8-cpu": "int8"}
    there = {form: word for form, word in forms.items() if FORMS[form] in manifest.files}
    sides = {
        form: stack.enter_context(open_runtime(bundle, "onnx", "cpu", threads, word)).logits
        for form, word in there.items()
    }
    size = manifest.geometry.size
    images = np.random.default_rng(1).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    seconds = interleaved({form: partial(side, images) for form, side in sides.items()}, warm=3, runs=runs)
    gated = ("agreement", "balanced_accuracy", "macro_auroc", "calibration_error")
    exact = not int8_saturates()
    return record(
        "inference",
        settings={
            **_settings(manifest, batch, threads, "precisions, ONNX Runtime"),
            "device": "cpu",
            "VNNI or its like": exact,
            "goal of INT8 / FP32": GOALS[exact],
            "test images": manifest.precisions["fp32"]["n"],
        },
        figures={
            form: {
                "images/s": rate(batch, values).median,
                "times FP32": ratio(seconds["fp32"], values).median,
                **{name: manifest.precisions[form][name] for name in gated},
            }
            for form, values in seconds.items()
        },
        n=runs,
        spread={f"{form}.times FP32": ratio(seconds["fp32"], values) for form, values in seconds.items()},
    )


def device_name() -> str:
    """Where all sides compute; asked for by name, so that none falls back to the CPU unnoticed."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _settings(manifest: Manifest, batch: int, threads: int, case: str) -> dict[str, Any]:
    size = manifest.geometry.size
    return {
        "case": case,
        "backbone": manifest.architecture.backbone,
        "size": size,
        "batch": batch,
        "threads": threads,
        "device": device_name(),
    }
