"""Options that several commands share, and the configuration they make."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from noisyssl.errors import ConfigError

if TYPE_CHECKING:
    from noisyssl.config import Config
    from noisyssl.pipelines.run import Run
    from noisyssl.pipelines.samples import Samples

Recipe = Annotated[
    str | None, typer.Option(help="TOML file with settings, or a shipped recipe, such as small.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="One setting, such as backbone=resnet50; may be given again."),
]
Seed = Annotated[int | None, typer.Option(help="Seed of weights, order and augmentation.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.")]
Noise = Annotated[
    str | None,
    typer.Option(
        help="Label noise to put into training and validation: symmetric:0.4, inclusive:0.4, pair:0.3, "
        "instance:0.3[:RUN], class:FILE[:RATE], or column:NAME for given labels of the data's own. "
        "Without it the labels are taken as they are."
    ),
]
Epochs = Annotated[int | None, typer.Option(help="Passes over the training images.")]
Batch = Annotated[
    str | None,
    typer.Option(help="Images per batch, of all processes together; auto measures it on a GPU."),
]
Size = Annotated[int | None, typer.Option(help="Height and width in pixels.")]
Modality = Annotated[
    str | None,
    typer.Option(help="What the images are: natural, histology, xray or fundus; see `data views`."),
]
Quarantine = Annotated[bool | None, typer.Option("--quarantine", help="Leave broken files out and go on.")]
AllowLeaks = Annotated[
    bool | None, typer.Option("--allow-leaks", help="Go on although images or groups cross splits.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def batch_of(text: str | None) -> Any:
    """What `--batch` says, as a setting."""
    from noisyssl.recipe import literal

    return None if text is None else literal(text)


def resolve(
    recipe: str | None,
    settings: Iterable[str] | None,
    flags: dict[str, Any],
    start: dict[str, Any] | None = None,
) -> "Config":
    """The configuration of a command line, with the automatic numbers filled in."""
    from dataclasses import replace

    from noisyssl.pipelines.setup import threads_of
    from noisyssl.recipe import load

    config = load(recipe, settings or (), flags, start)
    path = str(Path(config.data.path).absolute()) if config.data.path else ""
    return replace(config, threads=threads_of(config.threads), data=replace(config.data, path=path))


def settings(
    out: Path,
    stage: str,
    recipe: str | None,
    set_: list[str] | None,
    flags: dict[str, Any],
    resume: bool,
    start: dict[str, Any] | None = None,
) -> "Config":
    """The configuration; of a run that is resumed its own, which anything given must agree with."""
    from noisyssl.distributed import rank
    from noisyssl.pipelines.run import Run

    if not resume:
        if rank() == 0 and out.exists():  # the first process may have made it by now
            raise ConfigError(f"--out {out} already exists; give a new folder, or --resume to go on with it.")
        return resolve(recipe, set_, flags, start)
    from noisyssl.recipe import override, parse, tree_of

    run = Run.open(out, stage)
    tree = tree_of(run.config())
    override(tree, recipe, set_ or (), flags)
    run.must_match(config := parse(tree))
    return config


def architecture_of(init: Path) -> dict[str, Any]:
    """The settings a pretraining run implies: its backbone, stem and image size, and what its images are."""
    from noisyssl.pipelines.pretrain import backbone_of
    from noisyssl.pipelines.run import Run

    _, facts = backbone_of(init)
    return {
        "backbone": facts["backbone"],
        "stem": facts["stem"],
        "data.size": facts["size"],
        "data.modality": Run.open(init, "pretrain").config().data.modality,
    }


def open_data(
    config: "Config",
    labelled: bool | None = None,
    classify: bool = True,
    run: "Run | None" = None,
    moved: str = "",
) -> "Samples":
    """The samples that `config.data` names, scanned once; what was decided by itself goes to stderr.

    `labelled` and `classify` as in `open_samples`. Of a `run` that exists its own rows, whatever became of
    their files since. `moved` is what to do if the data that earlier settings name is not there any more.
    """
    from noisyssl.cli.progress import counting, tell
    from noisyssl.distributed import rank
    from noisyssl.pipelines.findings import unmeasured
    from noisyssl.pipelines.reopen import reopen_samples
    from noisyssl.pipelines.scan import open_samples

    data, threads = config.data, config.threads
    if not data.path:
        raise ConfigError("no data given; name class folders, a CSV, an npz or a packed folder.")
    if moved and not Path(data.path).exists():
        raise ConfigError(f"{data.path}, the data, does not exist any more; {moved}.")
    with counting("checking images") as progress:
        if run is not None:
            samples = reopen_samples(
                run, data.path, quarantine=data.quarantine, threads=threads, progress=progress
            )
        else:
            samples = open_samples(
                data.path,
                seed=data.split_seed,
                quarantine=data.quarantine,
                allow_leaks=data.allow_leaks,
                labelled=labelled,
                classify=classify,
                threads=threads,
                progress=progress,
            )
    for note in samples.notes if rank() == 0 else ():
        tell(f"note: {note}")
    if classify and run is None and labelled is not False:
        for warning in unmeasured(samples) if rank() == 0 else ():
            tell(f"warning: {warning}")
    return samples
