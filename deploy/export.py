"""A bundle from a trained classifier: ONNX files that keep their gates, engines, weights, the manifest."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from noisyssl import __version__, machine
from noisyssl.deploy import bundle, engines, forms, parity, to_onnx, to_tensorrt
from noisyssl.deploy.bundle import PRECISIONS, Architecture, Geometry, Input, Manifest
from noisyssl.deploy.draft import digests, draft_of, must_be_new
from noisyssl.deploy.forms import Batches
from noisyssl.deploy.gates import Gates
from noisyssl.errors import ConfigError, pick

if TYPE_CHECKING:
    from noisyssl.classifier import Classifier


def export_bundle(
    out: Path,
    *,
    classifier: "Classifier",
    architecture: Mapping[str, str],
    classes: Sequence[str],
    size: int,
    fit: str,
    images: Batches,
    figures: Mapping[str, Any],
    training: Mapping[str, Any],
    checkpoint: Mapping[str, Any],
    tensorrt: Sequence[str] | None,
    profile: to_tensorrt.Profile = (1, 8, 64),
    tolerance: float = 1e-4,
    flavour: str = "auto",
    precisions: Sequence[str] = ("fp32",),
    calibration: Batches | None = None,
    labels: np.ndarray | None = None,
    gates: Gates | None = None,
    reduced: bool = False,
    answers: Mapping[str, Any] | None = None,
) -> Manifest:
    """The manifest of the new bundle `out`.

    `images` gives the run's test images in batches of (B, size, size, 3) uint8 each time it is called, and
    `calibration` training images in the same way. `labels` are the true classes of the former, -1 where
    unknown. `tensorrt` lists compute capabilities ("SM86"), may be empty for the flavour's default, and is
    None for no engine. `architecture` has `backbone` and `stem`; figures, training and checkpoint are kept as
    given. FP32 is always written; of the other `precisions` those that keep `gates`: the manifest's
    `precisions` says which, and `forms.faults` puts it into words. `reduced` as in `quantize.quantise`;
    `answers` as in the manifest.

    Raises:
        ConfigError: `out` exists, or a setting is wrong.
        ExportError: the FP32 file does not compute what the classifier does.
        MachineError: the disk is full, or a package or the GPU to build for is missing.
    Whatever is raised, nothing is left behind.
    """
    must_be_new(out)
    if len(classes) != classifier.head.out_features:
        raise ConfigError(
            f"classes has {len(classes)} names; the classifier has {classifier.head.out_features} logits. "
            "Pass the classes of its run."
        )
    for name in precisions:
        pick(dict.fromkeys(PRECISIONS), name, "precision")
    if calibration is None and set(precisions) - {"fp32"}:
        raise ConfigError(f"precision {','.join(precisions)} needs calibration images; pass training images.")
    tools = {**machine.versions(), "python": platform.python_version()}
    if tensorrt is not None:  # asked first: an engine that cannot be built costs no export
        flavour = to_tensorrt.choose(tensorrt, flavour)
    with draft_of(out) as draft:
        fields = {
            "classes": list(classes), "geometry": {"size": size, "fit": fit}, "checkpoint": checkpoint,
            "training": training, "version": __version__,
        }  # fmt: skip
        temperature = float((answers or {}).get("temperature", 1.0))
        to_onnx.export(
            classifier,
            draft / bundle.ONNX,
            size=size,
            metadata=bundle.finite(fields),
            temperature=temperature,
        )
        measured, reference, fp32 = parity.measure(
            classifier, draft / bundle.ONNX, images(), tolerance, temperature
        )
        table = forms.write(
            draft, forms.forms_of(precisions), reference=reference, fp32=fp32, images=images,
            calibration=calibration or images, labels=labels, gates=gates or Gates(), tolerance=tolerance,
            reduced=reduced, temperature=temperature,
        )  # fmt: skip
        if tensorrt is not None:
            engines.build(
                draft, ["fp32", *(p for p in PRECISIONS[1:] if p in precisions)], size=size,
                capabilities=tensorrt, profile=profile, flavour=flavour,
            )  # fmt: skip
        _save_weights(classifier, draft / bundle.WEIGHTS)
        manifest = Manifest(
            classes=tuple(classes),
            input=Input(size=size),
            geometry=Geometry(size=size, fit=fit),
            architecture=Architecture(backbone=architecture["backbone"], stem=architecture["stem"]),
            checkpoint=bundle.finite(checkpoint),
            training=bundle.finite(training),
            figures=bundle.finite(figures),
            parity=asdict(measured),
            precisions=bundle.finite(table),
            answers=bundle.finite(answers or {}),
            tools=tools,
            files=digests(draft),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        bundle.write(draft, manifest)
    return manifest


def _save_weights(classifier: "Classifier", path: Path) -> None:
    """The unfolded float32 state dict, as the torch runtime loads it."""
    from safetensors.torch import save

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in classifier.state_dict().items()}
    bundle.save(path, save(state))
