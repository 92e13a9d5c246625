"""A bundle from a trained classifier: ONNX, the gate, an engine, weights, the manifest; whole or not at all.

Everything is written into a hidden folder beside the bundle, and renamed when it is complete and on the disk.
"""

import os
import platform
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from noisyssl import __version__, machine
from noisyssl.deploy import bundle, parity, to_onnx, to_tensorrt
from noisyssl.deploy.bundle import Architecture, Geometry, Input, Manifest
from noisyssl.errors import ConfigError, MachineError

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
    images: Callable[[], Iterable[np.ndarray]],
    figures: Mapping[str, Any],
    training: Mapping[str, Any],
    checkpoint: Mapping[str, Any],
    tensorrt: Sequence[str] | None,
    profile: to_tensorrt.Profile = (1, 8, 64),
    tolerance: float = 1e-4,
    flavour: str = "auto",
) -> Manifest:
    """The manifest of the new bundle `out`.

    `images` gives the run's test images in batches of (B, size, size, 3) uint8 each time it is called.
    `tensorrt` lists compute capabilities ("SM86"), may be empty for the flavour's default, and is None for no
    engine. `architecture` has `backbone` and `stem`; figures, training and checkpoint are kept as given.

    Raises:
        ConfigError: `out` exists, or a setting of the engine is wrong.
        ExportError: the ONNX file does not compute what the classifier does.
        MachineError: the disk is full, or a package or the GPU to build for is missing.
    Whatever is raised, nothing is left behind.
    """
    if os.path.lexists(out):
        raise ConfigError(f"{out} already exists; give a new folder, bundles are never overwritten.")
    if all((out.parent / name).is_file() for name in (bundle.MANIFEST, bundle.ONNX)):
        raise ConfigError(f"{out} lies in a bundle, which is never written into; name a folder outside it.")
    if len(classes) != classifier.head.out_features:
        raise ConfigError(
            f"classes has {len(classes)} names; the classifier has {classifier.head.out_features} logits. "
            "Pass the classes of its run."
        )
    tools = {**machine.versions(), "python": platform.python_version()}
    if tensorrt is not None:  # asked first: an engine that cannot be built costs no export
        flavour = to_tensorrt.choose(tensorrt, flavour)
    out = out.absolute()
    parents = [folder for folder in out.parents if not folder.exists()]
    draft = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        draft.mkdir(parents=True)  # not mkdtemp, whose folder only its owner could read
        fields = {
            "classes": list(classes), "geometry": {"size": size, "fit": fit}, "checkpoint": checkpoint,
            "training": training, "version": __version__,
        }  # fmt: skip
        to_onnx.export(classifier, draft / bundle.ONNX, size=size, metadata=bundle.finite(fields))
        measured = parity.check(classifier, draft / bundle.ONNX, images(), tolerance)
        if tensorrt is not None:
            (draft / "engines").mkdir()
            to_tensorrt.build(
                draft / bundle.ONNX, draft / "engines" / f"model.{flavour}.plan", capabilities=tensorrt,
                profile=profile, flavour=flavour,
            )  # fmt: skip
        _save_weights(classifier, draft / bundle.WEIGHTS)
        names = sorted(path.relative_to(draft).as_posix() for path in draft.rglob("*") if path.is_file())
        manifest = Manifest(
            classes=tuple(classes),
            input=Input(size=size),
            geometry=Geometry(size=size, fit=fit),
            architecture=Architecture(backbone=architecture["backbone"], stem=architecture["stem"]),
            checkpoint=bundle.finite(checkpoint),
            training=bundle.finite(training),
            figures=bundle.finite(figures),
            parity=asdict(measured),
            tools=tools,
            files={name: bundle.sha256(draft / name) for name in names},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        bundle.write(draft, manifest)
        bundle.read(draft)  # what a server will do; a bundle that cannot be read is not handed out
        for folder in (draft / "engines", draft):
            if folder.is_dir():
                _flush(folder)
        draft.rename(out)
        _flush(out.parent)
    except OSError as error:
        raise MachineError(
            f"{out} cannot be written ({error.strerror or error}); nothing was left behind. "
            "Free some space or choose another folder, then export again."
        ) from error
    finally:
        if draft.exists():
            shutil.rmtree(draft, ignore_errors=True)
        for folder in parents:
            with suppress(OSError):  # not empty: it holds the bundle
                folder.rmdir()
    return manifest


def _save_weights(classifier: "Classifier", path: Path) -> None:
    """The unfolded float32 state dict, as the torch runtime loads it."""
    from safetensors.torch import save

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in classifier.state_dict().items()}
    bundle.save(path, save(state))


def _flush(folder: Path) -> None:
    """Make names in `folder` durable; Windows has no such call."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
