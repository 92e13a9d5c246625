"""`noisyssl export`: a finished run becomes a bundle, or nothing at all."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from noisyssl.cli.options import Json, Quarantine, open_data
from noisyssl.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from noisyssl.config import ExportConfig
    from noisyssl.deploy.bundle import Manifest


def export(
    run: Annotated[Path, typer.Argument(help="Run folder of `noisyssl train`.")],
    bundle: Annotated[Path, typer.Argument(help="Bundle folder to create.")],
    checkpoint: Annotated[str | None, typer.Option(help="best, or last: the final epoch's weights.")] = None,
    tensorrt: Annotated[
        str | None,
        typer.Option(help="Compute capabilities of the TensorRT engine, such as SM86,SM120; or none."),
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
    """Write ONNX, a TensorRT engine and a manifest, after proving that they compute what was trained."""
    manifest = write_bundle(
        run, bundle, checkpoint=checkpoint, tensorrt=tensorrt, data=data, quarantine=quarantine,
        settings=set_ or [],
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(asdict(manifest)))
    else:
        for line in summary(bundle, manifest):
            typer.echo(line)


def write_bundle(
    run_folder: Path,
    out: Path,
    *,
    checkpoint: str | None = None,
    tensorrt: str | None = None,
    data: Path | None = None,
    quarantine: bool | None = None,
    settings: list[str] | None = None,
) -> "Manifest":
    """The manifest of the bundle `out` made from a finished training run.

    Args:
        data: where the run's data is now; by default where it was.
        quarantine: leave out files that broke since; by default as the run did.
    """
    import numpy as np

    from noisyssl.classifier import build_classifier
    from noisyssl.deploy.export import export_bundle
    from noisyssl.pipelines.evaluate import evaluation_images, whole
    from noisyssl.pipelines.run import Run

    if out.exists():
        raise ConfigError(f"{out} already exists; give a new folder, bundles are never overwritten.")
    run = Run.open(run_folder, "train")
    metrics, config = run.metrics(), run.config()
    chosen = _settings(config.export, checkpoint, tensorrt, settings or [])
    engines = must_be_buildable(chosen, asked=tensorrt is not None)
    weights, facts = run.weights(chosen.checkpoint)
    place = replace(
        config.data,
        path=str(data.absolute()) if data else config.data.path,
        quarantine=config.data.quarantine if quarantine is None else quarantine,
    )
    samples = open_data(replace(config, data=place), run=run)
    dropped: dict[int, str] | None = {} if place.quarantine else None
    test = samples.where("test")
    classifier = build_classifier(config.backbone, config.stem, len(samples.classes))
    classifier.load_state_dict(weights)
    figures = metrics["best" if chosen.checkpoint == "best" else "final"]["figures"]
    with evaluation_images(
        samples, test, config.data.size, config.data.fit, config.threads, dropped=dropped
    ) as images:
        seen = np.flatnonzero(whole(test, dropped or {}))

        def batches() -> "Iterator[np.ndarray]":
            for start in range(0, len(seen), 64):
                yield images[seen[start : start + 64]]

        return export_bundle(
            out,
            classifier=classifier,
            architecture={"backbone": config.backbone, "stem": config.stem},
            classes=samples.classes,
            size=config.data.size,
            fit=config.data.fit,
            images=batches,
            figures=figures,
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


def summary(out: Path, manifest: "Manifest") -> list[str]:
    """What was written and what was proved."""
    parity = manifest.parity
    lines = [
        f"{out}: {manifest.architecture.backbone}, {len(manifest.classes)} classes, "
        f"{manifest.checkpoint['which']} weights (epoch {manifest.checkpoint['epoch']})",
        f"gate: {parity['n']} test images, largest logit difference {parity['max_logit_difference']:.1e}, "
        f"{parity['top1_changes']} top-1 changes",
    ]
    for name in sorted(manifest.files):
        size = (out / name).stat().st_size / 1e6
        note = _engine_note(out / name) if name.endswith(".plan") else ""
        lines.append(f"  {name:<28} {size:8.2f} MB  {note}".rstrip())
    if not any(name.endswith(".plan") for name in manifest.files):
        from noisyssl.deploy.to_tensorrt import flavours

        why = "none was asked for" if flavours() else "run `pip install 'noisyssl[rtx]'` and export again"
        lines.append(f"  no TensorRT engine: {why}")
    lines.append(f"Next: noisyssl predict {out} IMAGES")
    return lines


def _engine_note(plan: Path) -> str:
    sidecar = json.loads(plan.with_name(plan.name + ".json").read_text(encoding="utf-8"))
    return f"{sidecar['flavour']} {sidecar['version']} for {', '.join(sidecar['compute_capabilities'])}"


def _settings(
    saved: "ExportConfig", checkpoint: str | None, tensorrt: str | None, settings: list[str]
) -> "ExportConfig":
    from noisyssl.recipe import load

    flags: dict[str, Any] = {
        "export.checkpoint": checkpoint,
        "export.tensorrt": None if tensorrt is None else ("" if tensorrt == "none" else tensorrt),
    }
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
