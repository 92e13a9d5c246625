"""`noisyssl evaluate`: the figures of a run or a bundle on any labelled set."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from noisyssl.cli.data import printable
from noisyssl.cli.figures import interval
from noisyssl.cli.options import Device, Json, Quarantine
from noisyssl.cli.progress import tell
from noisyssl.errors import ConfigError, DataError, near_miss, pick

if TYPE_CHECKING:
    import numpy as np

    from noisyssl.pipelines.samples import Samples

Logits = Callable[["np.ndarray"], "np.ndarray"]


def evaluate(
    model: Annotated[Path, typer.Argument(help="Run folder of `noisyssl train`, or a bundle.")],
    data: Annotated[
        Path, typer.Argument(help="Labelled data; its test split where it has splits, else all.")
    ],
    checkpoint: Annotated[
        str, typer.Option(help="Of a run: best, or last: the final epoch's weights.")
    ] = "best",
    runtime: Annotated[
        str, typer.Option(help="Of a bundle: onnx, onnx-tensorrt, torch or tensorrt.")
    ] = "onnx",
    precision: Annotated[
        str, typer.Option(help="Of a bundle: fp32, or fp16 or int8 where it has that file.")
    ] = "fp32",
    split: Annotated[str, typer.Option(help="Split to measure where the data has splits.")] = "test",
    device: Device = None,
    quarantine: Quarantine = None,
    as_json: Json = False,
) -> None:
    """Measure a run or a bundle on labelled images, with bootstrap intervals over groups."""
    from noisyssl.evaluation import figures
    from noisyssl.pipelines.evaluate import evaluation_images
    from noisyssl.pipelines.labels import truth_of
    from noisyssl.pipelines.samples import SPLITS
    from noisyssl.pipelines.scan import open_samples
    from noisyssl.pipelines.setup import threads_of

    pick(dict.fromkeys(SPLITS), split, "--split")
    with ExitStack() as stack:
        logits, classes, size, fit, served = _opened(model, checkpoint, runtime, precision, device, stack)
        temperature = 1.0 if served is None else served
        samples = open_samples(data, labelled=True, evaluation=True, quarantine=bool(quarantine))
        rows = samples.where(split)
        for note in (*samples.notes, *_trained_on(model, samples, rows)):
            tell(f"note: {note}")
        if not len(rows):
            raise DataError(f"{data} has no {split} samples; choose another --split.")
        labels = _in_terms_of(classes, samples, truth_of(samples)[rows])
        images = stack.enter_context(evaluation_images(samples, rows, size, fit, threads_of(0)))
        groups = [samples.groups[i] for i in rows]
        measured = figures(logits(images) / temperature, labels, groups, classes).to_json()
    if as_json:
        typer.echo(json.dumps(measured | {"temperature": temperature}))
        return
    many = f"{measured['groups']} groups" if measured["groups"] > 1 else "1 group: too few for intervals"
    typer.echo(f"{model} on {data}, split {split}: {measured['n']} images, {many} [95 % interval]")
    typer.echo(
        "probabilities of the run, at temperature 1; a bundle's are at the fitted one"
        if served is None
        else f"probabilities as the bundle serves them, at temperature {temperature:.3f}"
    )
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "macro_auroc", "calibration_error"):
        typer.echo(f"{name.replace('_', ' '):<20} {interval(measured[name])}")
    width = max(len(printable(name)) for name in (*classes, "class"))
    typer.echo(f"{'class':<{width}}  sensitivity           specificity")
    for name in classes:
        pair = (measured["sensitivity"][name], measured["specificity"][name])
        if pair[0]["value"] is not None:
            typer.echo(f"{printable(name):<{width}}  {interval(pair[0])}  {interval(pair[1])}")


def _opened(
    model: Path, checkpoint: str, runtime: str, precision: str, device: str | None, stack: ExitStack
) -> tuple[Logits, tuple[str, ...], int, str, float | None]:
    """(images -> logits, classes, size, fit, temperature) of a bundle, or of a run, which has none."""
    if (model / "manifest.json").exists():
        from noisyssl.deploy.bundle import read
        from noisyssl.deploy.runtime import open_runtime

        manifest = read(model)
        opened = stack.enter_context(open_runtime(model, runtime, device, precision=precision))
        geometry = manifest.geometry
        return _batched(opened.logits), manifest.classes, geometry.size, geometry.fit, manifest.temperature()
    if not model.exists():
        raise ConfigError(f"{model} does not exist; give a run of `noisyssl train` or a bundle.")
    from noisyssl.classifier import build_classifier
    from noisyssl.pipelines.evaluate import logits_of
    from noisyssl.pipelines.run import Run
    from noisyssl.pipelines.setup import device_of

    if precision != "fp32":
        raise ConfigError(f"--precision {precision} is of a bundle, {model} is a run; export it first.")
    if checkpoint not in ("best", "last"):
        raise ConfigError(f"--checkpoint is {checkpoint!r}; choose best or last.")
    run = Run.open(model, "train")
    config = run.config()
    weights, _ = run.weights(checkpoint)
    classes = tuple(run.facts()["classes"])
    where = device_of(device or config.device)
    network = build_classifier(config.backbone, config.stem, len(classes))
    network.load_state_dict(weights)
    network.to(where)
    return lambda images: logits_of(network, images, where), classes, config.data.size, config.data.fit, None


def _trained_on(model: Path, samples: "Samples", rows: "np.ndarray") -> list[str]:
    """A note where a run was trained on images that it is measured on; of a bundle that is not known."""
    from noisyssl.pipelines.tables import read_own_table

    if not (model / "samples.csv").is_file():
        return []
    table = read_own_table(model / "samples.csv", ("split", "digest"))
    used = {digest for split, digest in zip(*table.values(), strict=True) if split != "test"}
    count = sum(samples.digests[row] in used for row in rows.tolist())
    if not count:
        return []
    return [
        f"{count:,} of these {len(rows):,} images trained or validated {model}: the figures are no test. "
        "Its test images are those with split test in its samples.csv."
    ]


def _batched(logits: Logits, batch: int = 64) -> Logits:
    import numpy as np

    return lambda images: np.concatenate(
        [logits(images[i : i + batch]) for i in range(0, len(images), batch)]
    )


def _in_terms_of(classes: tuple[str, ...], samples: "Samples", labels: "np.ndarray") -> "np.ndarray":
    """The labels as the model numbers its classes.

    Raises:
        DataError: the data has a class the model does not know.
    """
    import numpy as np

    own: dict[str, Any] = {name: i for i, name in enumerate(classes)}
    used = {samples.classes[i] for i in np.unique(labels[labels >= 0])}
    for name in sorted(used - set(own)):
        raise DataError(
            f"class {name!r} of {samples.root} is unknown to the model, which has {', '.join(classes)}."
            f"{near_miss(name, classes)} Rename it in the data."
        )
    return np.array([own[samples.classes[i]] if i >= 0 else -1 for i in labels], dtype=np.int64)
