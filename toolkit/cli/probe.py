"""`noisyssl probe` and `noisyssl embed`: what frozen features are worth, and the features themselves."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from noisyssl.cli.figures import interval
from noisyssl.cli.options import AllowLeaks, Device, Json, Quarantine
from noisyssl.cli.progress import counting, tell
from noisyssl.errors import ConfigError

if TYPE_CHECKING:
    from noisyssl.pipelines.samples import Samples

RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="Run of `noisyssl pretrain`, or of `train` (its BEST backbone).")
]


def probe(
    run: RunFolder,
    data: Annotated[Path, typer.Argument(help="Labelled data: its train split teaches, test is measured.")],
    random: Annotated[
        bool, typer.Option("--random", help="Random weights in the run's architecture, to compare with.")
    ] = False,
    k: Annotated[int, typer.Option(help="Neighbours that vote.")] = 20,
    labels: Annotated[
        str, typer.Option(help="Labels that teach: true (where the data knows them) or given.")
    ] = "true",
    device: Device = None,
    quarantine: Quarantine = None,
    allow_leaks: AllowLeaks = None,
    as_json: Json = False,
) -> None:
    """Measure frozen features: k-NN and a linear probe, beside what colour alone can tell."""
    from noisyssl.pipelines.embed import frozen_backbone
    from noisyssl.pipelines.probing import measure
    from noisyssl.pipelines.setup import device_of, seen_by, threads_of

    frozen = frozen_backbone(run, random=random)
    where = device_of(device or "auto")
    samples = _opened(run, data, quarantine, allow_leaks, classify=True)
    for warning in [] if random else seen_by(run, samples):
        tell(f"note: {warning['message']}")
    with counting("looking at images") as progress:
        found = measure(frozen, samples, where, threads_of(0), labels=labels, k=k, progress=progress)
    if as_json:
        typer.echo(json.dumps({"run": str(run), "data": str(data)} | found))
        return
    rows = {f"k-NN (k = {k})": found["knn"], f"linear probe (C = {found['strength']:g})": found["linear"]}
    rows |= {f"baseline {name.replace('_', ' ')}": one for name, one in found["baselines"].items()}
    columns = ("balanced_accuracy", "accuracy", "macro_auroc")
    title = "test figures [95 % interval]"
    width = max(len(name) for name in (title, *rows))
    typer.echo(f"{run} ({frozen.what}) on {data}")
    images, kinds, groups = found["images"], found["labels"], found["knn"]["groups"]
    typer.echo(f"taught by {images['train']:,} training images with {kinds['taught']} labels")
    within = f"in {groups:,} groups" if groups > 1 else "of one group: too few for intervals"
    typer.echo(f"measured on {images['test']:,} test images {within}, with {kinds['measured']} labels")
    header = "  ".join(f"{name.replace('_', ' '):<20}" for name in columns)
    typer.echo(f"{title:<{width}}  {header}".rstrip())
    for name, one in rows.items():
        typer.echo(f"{name:<{width}}  {'  '.join(interval(one[column]) for column in columns)}".rstrip())
    typer.echo(
        f"effective rank {found['effective_rank']:.1f} of {found['dimensions']}; standard deviation "
        f"{found['std']:.4f} of at most {found['full_std']:.4f}"
    )


def embed(
    run: RunFolder,
    data: Annotated[Path, typer.Argument(help="Any images, with or without labels.")],
    *,
    out: Annotated[Path, typer.Option(help="The .npz to write; must not exist.")],
    device: Device = None,
    quarantine: Quarantine = None,
    as_json: Json = False,
) -> None:
    """Write the frozen features of every image, with path, label, split and group, as .npz."""
    import numpy as np

    from noisyssl.pipelines.embed import columns_of, features_of, frozen_backbone, write_arrays
    from noisyssl.pipelines.setup import device_of, threads_of

    if out.exists():
        raise ConfigError(f"--out {out} already exists; name a new file.")
    frozen = frozen_backbone(run)
    where = device_of(device or "auto")
    samples = _opened(run, data, quarantine, True, classify=False)
    rows = np.arange(len(samples))
    with counting("looking at images") as progress:
        (features,) = features_of(frozen, samples, rows, where, threads_of(0), progress=progress)
    facts = {"weights_sha256": frozen.digest, "data_sha256": samples.digest(), "weights": frozen.what}
    geometry = {"size": frozen.size, "fit": frozen.fit}
    write_arrays(out, {"features": features, **columns_of(samples, rows), **facts, **geometry})
    shape = {"images": len(features), "dimensions": features.shape[1]}
    if as_json:
        typer.echo(json.dumps({"out": str(out), **shape, **facts, **geometry}))
    else:
        typer.echo(f"{out}: {len(features):,} images, {features.shape[1]} features each ({frozen.what})")


def _opened(
    run: Path, data: Path, quarantine: bool | None, allow_leaks: bool | None, *, classify: bool
) -> "Samples":
    """The samples of `data`, with the splits that the run would make of it."""
    from noisyssl.pipelines.run import Run
    from noisyssl.pipelines.scan import open_samples

    with counting("checking images") as progress:
        samples = open_samples(
            data,
            seed=Run.open(run).config().data.split_seed,
            quarantine=bool(quarantine),
            allow_leaks=bool(allow_leaks),
            labelled=True if classify else None,
            classify=classify,
            progress=progress,
        )
    for note in samples.notes:
        tell(f"note: {note}")
    return samples
