"""`noisyssl pretrain` and `noisyssl train`."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from noisyssl.cli.figures import summary
from noisyssl.cli.options import (
    AllowLeaks,
    Batch,
    Device,
    Epochs,
    Json,
    Modality,
    Noise,
    Quarantine,
    Recipe,
    Seed,
    Set,
    Size,
    architecture_of,
    batch_of,
    open_data,
    settings,
)
from noisyssl.cli.progress import tell, training_progress
from noisyssl.errors import ConfigError, DataError, Stopped

if TYPE_CHECKING:
    from noisyssl.config import Config
    from noisyssl.pipelines.run import Run
    from noisyssl.pipelines.samples import Samples

Data = Annotated[
    Path | None, typer.Argument(help="Class folders, CSV, npz or packed folder; --resume knows it.")
]
Out = Annotated[Path, typer.Option(help="Run folder to create.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")]
Weights = Annotated[Path | None, typer.Option(help="Starting weights: .safetensors or a PyTorch state dict.")]


def pretrain(
    data: Data = None,
    *,
    out: Out,
    method: Annotated[
        str | None,
        typer.Option(
            help="simclr, moco2, moco3, byol, simsiam, barlow, vicreg, dino, rotation, jigsaw, jigmag or "
            "masked (docs/methods.md says what each is for)."
        ),
    ] = None,
    weights: Weights = None,
    recipe: Recipe = None,
    set_: Set = None,
    seed: Seed = None,
    device: Device = None,
    epochs: Epochs = None,
    batch: Batch = None,
    size: Size = None,
    modality: Modality = None,
    quarantine: Quarantine = None,
    allow_leaks: AllowLeaks = None,
    resume: Resume = False,
    nproc: Annotated[int, typer.Option(min=1, help="Processes on this machine, one per GPU.")] = 1,
    as_json: Json = False,
    context: typer.Context,
) -> None:
    """Learn a backbone from images alone."""
    from noisyssl.distributed import exchange, rank
    from noisyssl.pipelines import launch

    flags = {
        "pretrain.method": method,
        "pretrain.weights": _path(weights),
        "pretrain.epochs": epochs,
        "pretrain.batch": batch_of(batch),
    } | _shared(data, seed, device, size, modality, quarantine, allow_leaks)
    if nproc > 1 and not launch.started():
        settings(out, "pretrain", recipe, set_, flags, resume)  # what all would refuse is said once, at once
        raise typer.Exit(launch.run_processes(["-m", "noisyssl.cli", *context.obj], nproc))
    with launch.joined():
        if nproc > 1 and nproc != launch.local_world():
            raise ConfigError(
                f"--nproc is {nproc}, but torchrun started {launch.local_world()} processes on this machine; "
                "leave --nproc out."
            )
        resume = exchange(resume or (launch.attempt() > 0 and out.exists()))[0]
        config = settings(out, "pretrain", recipe, set_, flags, resume)
        metrics = run_stage("pretrain", config, out, resume=resume)
        if rank() > 0:
            return
        if as_json:
            typer.echo(json.dumps(metrics))
        else:
            loss = metrics["loss"]  # None: no step since the last line of the log was finite
            shown = "-" if loss is None else f"{loss:.4f}"
            done = f"{metrics['method']}, {metrics['epochs']} epochs, loss {shown}"
            typer.echo(f"{out}: {done}, {metrics['seconds']:.0f} s")
            typer.echo(f"Next: noisyssl train DATA --init {quote(str(out))} --out RUN")


def train(
    data: Data = None,
    *,
    out: Out,
    init: Annotated[Path | None, typer.Option(help="Pretraining run to start from.")] = None,
    pretrain_method: Annotated[
        str | None, typer.Option("--pretrain", help="Pretrain by this method first, into OUT-pretrain.")
    ] = None,
    noise: Noise = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="What is minimised: ce, smoothing, mixup, gce, sce, elr, forward, sop, "
            "coteaching or dividemix."
        ),
    ] = None,
    tune: Annotated[
        str | None,
        typer.Option(help="all, head (the backbone stays), or head:N (head for N epochs, then all)."),
    ] = None,
    val_labels: Annotated[str | None, typer.Option(help="Labels that choose BEST: noisy or clean.")] = None,
    weights: Weights = None,
    recipe: Recipe = None,
    set_: Set = None,
    seed: Seed = None,
    device: Device = None,
    epochs: Epochs = None,
    batch: Batch = None,
    size: Size = None,
    modality: Modality = None,
    quarantine: Quarantine = None,
    allow_leaks: AllowLeaks = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a classifier on labels some of which are wrong."""
    if init and pretrain_method:
        raise ConfigError("--init and --pretrain are both given; keep --init RUN, or --pretrain to make one.")
    before = out.with_name(f"{out.name}-pretrain") if pretrain_method else None
    if resume and before is not None and before.exists() and not out.exists():
        resume = False  # it was stopped while pretraining; that run resumes below
    flags = {
        "train.init": _path(init or before),
        "pretrain.method": pretrain_method,
        "train.noise": noise,
        "train.objective": objective,
        "train.tune": tune,
        "train.val_labels": val_labels,
        "train.weights": _path(weights),
        "train.epochs": epochs,
        "train.batch": batch_of(batch),
    } | _shared(data, seed, device, size, modality, quarantine, allow_leaks)
    start = architecture_of(init) if init else None
    config = settings(out, "train", recipe, set_, flags, resume, start)
    if init:
        _tell_modality(init, config)
    samples = None
    if before is not None:
        from noisyssl.pipelines import pretrain, train
        from noisyssl.pipelines.reopen import in_splits_of
        from noisyssl.pipelines.run import Run

        without = _without_training(config)
        for stage in (pretrain, train):  # said before pretraining, not after
            stage.must_make_sense(without)
        samples = open_data(config)
        if before.exists():
            samples = in_splits_of(Run.open(before, "pretrain"), samples)
        train.must_be_possible(config, samples)
        run_stage("pretrain", without, before, resume=before.exists(), samples=samples)
    metrics = run_stage("train", config, out, resume=resume, samples=samples)
    if as_json:
        typer.echo(json.dumps(metrics))
    else:
        for line in summary(metrics):
            typer.echo(line)
        typer.echo(f"Next: noisyssl export {quote(str(out))} BUNDLE")


def run_stage(
    stage: str, config: "Config", out: Path, *, resume: bool = False, samples: "Samples | None" = None
) -> dict[str, Any]:
    """Open the data and run (or resume, or find finished) one stage in `out`; its metrics.

    Several processes call this together; the first one shows and writes.
    """
    from noisyssl.distributed import exchange, rank, world
    from noisyssl.pipelines import batch_size, launch, pretrain, train
    from noisyssl.pipelines.labels import truth_of
    from noisyssl.pipelines.run import Run
    from noisyssl.pipelines.signals import caught
    from noisyssl.pipelines.watch import Truth

    module: Any = {"pretrain": pretrain, "train": train}[stage]
    if resume:
        run = Run.open(out, stage)
        run.must_match(config)
        with launch.first_here():
            again = f"noisyssl {stage} DATA --out {quote(str(out))} --resume"
            samples = open_data(config, run=run, moved=f"say where it is now: {again}")
        with run.alone():  # a training that goes on elsewhere keeps its settings
            run.adopt(config)
        config = run.settled(config)
    else:
        module.must_make_sense(config)
        with launch.first_here():
            samples = samples or open_data(config, classify=stage == "train")
    if world() > 1 and len(set(exchange(samples.digest()))) > 1:
        raise DataError(f"{config.data.path} is not the same data on every machine; give one that all share.")
    more: dict[str, Any] = {}
    found: dict[str, Any] = {}
    if stage == "pretrain":  # labels leave the samples; only the probe between epochs looks at them
        more = {"truth": Truth(samples.classes, truth_of(samples))}
        samples = samples.unlabelled()
    if not resume:
        config, found = batch_size.settle(config, stage, samples, module)
        module.must_be_possible(config, samples)
        run = Run.create(out, config, stage, samples, found)
    if exchange(run.is_finished())[0]:
        if rank() == 0:
            tell(f"{out} is finished already.")
        return run.metrics()
    work: Callable[..., dict[str, Any]] = getattr(module, stage)
    title = f"{stage} {out.name}"
    with (
        caught() as stopped,
        run.alone(),
        training_progress(title) as show,
        _events(config, stage, run) as board,
    ):
        run.shown = lambda entry: (show(entry), board(entry))
        if found:
            run.log({"kind": "batch", "time": time.time(), **found})
        metrics = work(config, samples, run, stopped=stopped, **more)
        if (signal := max(exchange(stopped() or 0))) and stage == "pretrain":
            raise Stopped(signal)  # it came in the last epoch: what would follow must not start
    return metrics


def _events(config: "Config", stage: str, run: "Run") -> Any:
    from contextlib import nullcontext

    from noisyssl.distributed import rank

    if not getattr(config, stage).tensorboard or rank() > 0:
        return nullcontext(lambda entry: None)
    from noisyssl.pipelines.board import tensorboard

    return tensorboard(run.folder / "tensorboard")


def _tell_modality(init: Path, config: "Config") -> None:
    """A note where pretraining and training take the images for different things."""
    from noisyssl.pipelines.run import Run

    before, now = Run.open(init, "pretrain").config().data.modality, config.data.modality
    if before != now:
        tell(f"note: {init} was pretrained with --modality {before}, this run has {now}.")


def _without_training(config: "Config") -> "Config":
    """The configuration of the pretraining run: what training starts from is not there yet."""
    return replace(config, train=replace(config.train, init=""))


def _shared(
    data: Path | None,
    seed: int | None,
    device: str | None,
    size: int | None,
    modality: str | None,
    quarantine: bool | None,
    allow_leaks: bool | None,
) -> dict[str, Any]:
    return {
        "data.path": _path(data),
        "data.size": size,
        "data.modality": modality,
        "data.quarantine": quarantine,
        "data.allow_leaks": allow_leaks,
        "seed": seed,
        "device": device,
    }


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())  # a run is exported from any folder
