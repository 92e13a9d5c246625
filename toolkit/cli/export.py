"""`noisyssl export`: a finished run becomes a bundle, or nothing at all."""

import json
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from noisyssl.cli.bundle_table import summary
from noisyssl.cli.options import Json, Quarantine, open_data
from noisyssl.errors import ConfigError, ExportError

if TYPE_CHECKING:
    import numpy as np

    from noisyssl.config import ExportConfig
    from noisyssl.deploy.bundle import Manifest
    from noisyssl.pipelines.samples import Samples


def export(
    run: Annotated[Path, typer.Argument(help="Run folder of `noisyssl train`.")],
    bundle: Annotated[Path, typer.Argument(help="Bundle folder to create.")],
    checkpoint: Annotated[str | None, typer.Option(help="best, or last: the final epoch's weights.")] = None,
    tensorrt: Annotated[
        str | None,
        typer.Option(help="Compute capabilities of the TensorRT engine, such as SM86,SM120; or none."),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32,fp16,int8: what to write beside FP32, if it keeps its gate.")
    ] = None,
    calibration: Annotated[
        int | None, typer.Option(help="Training images that set the scales of INT8.")
    ] = None,
    accuracy: Annotated[
        float | None, typer.Option(help="Wanted accuracy: predict then says which answers are that sure.")
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="Smallest, usual and largest batch of the engines: 1,8,64.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Where the run's data is now, if it was moved since.")
    ] = None,
    quarantine: Quarantine = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="One setting of export, such as export.tolerance=1e-5; may be given again."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write ONNX, TensorRT engines and a manifest, after proving that they compute what was trained.

    Exit code 4 when a lower precision failed its gate: the bundle is written without it.
    """
    manifest = write_bundle(
        run, bundle, checkpoint=checkpoint, tensorrt=tensorrt, precision=precision, calibration=calibration,
        accuracy=accuracy, batch=batch, data=data, quarantine=quarantine, settings=set_ or [],
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(asdict(manifest)))
    else:
        for line in summary(bundle, manifest):
            typer.echo(line)
    must_have_all(manifest)


def must_have_all(manifest: "Manifest") -> None:
    """Raises ExportError when a precision was left out of a bundle that is written."""
    from noisyssl.deploy.forms import faults

    if missing := faults(manifest.precisions):
        raise ExportError(
            f"{missing}. The bundle is written without it; serve another precision, or set that gate if you "
            "can defend it."
        )


def write_bundle(
    run_folder: Path,
    out: Path,
    *,
    checkpoint: str | None = None,
    tensorrt: str | None = None,
    precision: str | None = None,
    calibration: int | None = None,
    accuracy: float | None = None,
    batch: str | None = None,
    data: Path | None = None,
    quarantine: bool | None = None,
    settings: list[str] | None = None,
) -> "Manifest":
    """The manifest of the bundle `out` made from a finished training run.

    A lower precision that failed its gate is left out, and `manifest.precisions` says why; `must_have_all`
    makes an error of it.

    Args:
        precision: such as "fp32,fp16,int8"; by default what the run's `export.precision` says.
        data: where the run's data is now; by default where it was.
        quarantine: leave out files that broke since; by default as the run did.
    """
    import numpy as np

    from noisyssl.classifier import build_classifier
    from noisyssl.cli.calibration import calibration_rows
    from noisyssl.deploy.export import export_bundle
    from noisyssl.deploy.gates import Gates
    from noisyssl.machine import int8_saturates
    from noisyssl.pipelines.evaluate import evaluation_images, whole
    from noisyssl.pipelines.labels import truth_of
    from noisyssl.pipelines.run import Run

    if out.exists():
        raise ConfigError(f"{out} already exists; give a new folder, bundles are never overwritten.")
    run = Run.open(run_folder, "train")
    metrics, config = run.metrics(), run.config()
    chosen = _settings(
        config.export,
        settings or [],
        {
            "export.checkpoint": checkpoint,
            "export.tensorrt": None if tensorrt is None else ("" if tensorrt == "none" else tensorrt),
            "export.precision": precision,
            "export.calibration": calibration,
            "export.accuracy": accuracy,
            "export.profile": batch,
        },
    )
    engines = must_be_buildable(chosen, asked=tensorrt is not None)
    weights, facts = run.weights(chosen.checkpoint)
    place = replace(
        config.data,
        path=str(data.absolute()) if data else config.data.path,
        quarantine=config.data.quarantine if quarantine is None else quarantine,
    )
    moved = "say where it is now with --data DATA"
    samples = open_data(replace(config, data=place), run=run, moved=moved)
    dropped: dict[int, str] | None = {} if place.quarantine else None
    test = samples.where("test")
    lower = set(chosen.precision) - {"fp32"}
    train = calibration_rows(samples, chosen.calibration, config.seed) if lower else test[:0]
    classifier = build_classifier(config.backbone, config.stem, len(samples.classes))
    classifier.load_state_dict(weights)
    which = "best" if chosen.checkpoint == "best" else "final"
    answers = _answers(run_folder, metrics, which, chosen.accuracy)
    geometry = (config.data.size, config.data.fit, config.threads)
    with (
        evaluation_images(samples, test, *geometry, dropped=dropped) as images,
        evaluation_images(samples, train, *geometry, dropped=dropped) as seen_in_training,
    ):
        rows, fit_rows = (np.flatnonzero(whole(split, dropped or {})) for split in (test, train))

        return export_bundle(
            out,
            classifier=classifier,
            architecture={"backbone": config.backbone, "stem": config.stem},
            classes=samples.classes,
            size=config.data.size,
            fit=config.data.fit,
            images=lambda: _batches(images, rows),
            calibration=lambda: _batches(seen_in_training, fit_rows),
            labels=truth_of(samples)[test[rows]],
            precisions=chosen.precision,
            gates=Gates(**{f.name: getattr(chosen, f.name) for f in fields(Gates)}),
            reduced=int8_saturates() if chosen.int8_range == "auto" else chosen.int8_range == "reduced",
            figures=_figures(run_folder, metrics, which, answers, samples),
            answers=answers,
            training={
                "objective": config.train.objective,
                "pretraining": metrics["pretraining"],
                "noise": {k: metrics["noise"][k] for k in ("spec", "asked", "realised", "val_labels")},
                "data": run.facts()["data"],
                "images": metrics["images"],
            },
            checkpoint={"which": chosen.checkpoint, **facts},
            tensorrt=engines,
            profile=(chosen.profile[0], chosen.profile[1], chosen.profile[2]),
            tolerance=chosen.tolerance,
        )


def _answers(run: Path, metrics: dict[str, Any], which: str, accuracy: float) -> dict[str, Any]:
    """The temperature that training fitted, and the threshold for `accuracy` where one is wanted.

    Raises:
        ConfigError: no confidence is right that often, or the run is of an earlier version.
    """
    from noisyssl.pipelines.after import Logits, threshold

    fitted = metrics[which].get("calibration")
    logits = Logits.read(run) if accuracy else None
    if fitted is None and accuracy:
        raise ConfigError(
            f"--accuracy is {accuracy:g}, but {run} has no labelled validation images to fit it on; "
            "leave it out."
        )
    if fitted is None:
        return {}
    found: dict[str, Any] = {name: fitted[name] for name in ("temperature", "fitted_on", "warning")}
    if logits is not None:
        sure = threshold(logits, which, fitted["temperature"], accuracy)
        if sure is None:
            raise ConfigError(
                f"--accuracy is {accuracy:g}, but no validation answers are right that often; ask for less."
            )
        found |= sure
    return found


def _figures(
    run: Path, metrics: dict[str, Any], which: str, answers: dict[str, Any], samples: "Samples"
) -> dict[str, Any]:
    """The test figures of the weights, at the temperature that the bundle serves."""
    from noisyssl.pipelines.after import served

    if not answers:
        return metrics[which]["figures"]
    measured = [i for i in samples.where("test").tolist() if samples.paths[i] not in metrics["dropped"]]
    groups = [samples.groups[i] for i in measured]
    return served(run, which, answers["temperature"], groups, metrics["classes"])


def _batches(images: "np.ndarray", rows: "np.ndarray") -> "Iterator[np.ndarray]":
    for start in range(0, len(rows), 64):
        yield images[rows[start : start + 64]]


def _settings(saved: "ExportConfig", settings: list[str], flags: dict[str, Any]) -> "ExportConfig":
    from noisyssl.recipe import load

    if foreign := [s for s in settings if not s.startswith("export.")]:
        raise ConfigError(
            f"--set {foreign[0]} is not of this stage; export takes settings export.NAME=VALUE."
        )
    given = load(None, settings, flags).export
    names = {s.partition("=")[0].strip().removeprefix("export.") for s in settings}
    names |= {k.removeprefix("export.") for k, v in flags.items() if v is not None}
    return replace(saved, **{name: getattr(given, name) for name in names})


def must_be_buildable(chosen: "ExportConfig", asked: bool = False) -> tuple[str, ...] | None:
    """The capabilities to build an engine for; None for no engine.

    Where nobody asked, it is the GPU that TensorRT finds here, else what `chosen` names, else none.

    Raises:
        ConfigError, MachineError: no engine can be built for a capability that was asked for.
    """
    from noisyssl.config import ExportConfig
    from noisyssl.deploy.cuda_driver import capability
    from noisyssl.deploy.to_tensorrt import choose, flavours

    asked = asked or chosen.tensorrt != ExportConfig().tensorrt
    if not chosen.tensorrt or (not asked and not flavours()):
        return None
    wanted = chosen.tensorrt
    if not asked and "tensorrt" in flavours():
        if capability():
            wanted = ()
        elif "tensorrt_rtx" not in flavours():
            return None
    choose(wanted)
    return wanted
