"""`noisyssl bench`: measure this machine; every number becomes a record."""

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from noisyssl.cli.bench_dicom import dicom
from noisyssl.cli.bench_engines import engines
from noisyssl.cli.bench_noise import noise
from noisyssl.cli.bench_records import Out, Runs, Threads, tell
from noisyssl.cli.bench_serving import serving
from noisyssl.cli.options import Json, Modality, Set, open_data, resolve
from noisyssl.cli.progress import tell as say

if TYPE_CHECKING:
    from noisyssl.config import Config

app = typer.Typer(no_args_is_help=True, help="Measure this machine; every number becomes a record.")


@app.command()
def loading(
    count: Annotated[int, typer.Option(help="Images timed in one turn.")] = 1024,
    batch: Annotated[int, typer.Option(help="Images per batch.")] = 64,
    threads: Threads = 0,
    runs: Runs = 5,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Augmented images a second: DALI against torchvision's DataLoader, packed against JPEG."""
    from noisyssl.benchmarks.loading import measure
    from noisyssl.pipelines.setup import threads_of

    tell(measure(count, batch, threads_of(threads), runs), out, as_json)


@app.command()
def step(
    method: Annotated[
        list[str] | None, typer.Option(help="Method; may be given again; all without it.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="Backbone, size, optimizer and widths.")] = "small",
    batch: Annotated[int, typer.Option(help="Samples per step.")] = 64,
    threads: Threads = 0,
    runs: Runs = 7,
    profile: Annotated[
        Path | None, typer.Option(help="Also write a Chrome trace of the first method's step to this file.")
    ] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Time and memory of one training step of each method, next to its backbone alone."""
    from noisyssl.benchmarks.step import config_of, measure, method_step
    from noisyssl.methods import METHODS
    from noisyssl.pipelines.setup import threads_of

    tell([measure(method or tuple(METHODS), recipe, batch, threads_of(threads), runs)], out, as_json)
    if profile is not None:
        from noisyssl.benchmarks.trace import traced

        name = next(iter(method or METHODS))
        say(f"{name}, written to {profile}:\n{traced(method_step(config_of(name, recipe, batch)), profile)}")


@app.command()
def features(
    data: Annotated[Path, typer.Argument(help="Labelled data: its train split teaches, test is measured.")],
    work: Annotated[Path, typer.Option(help="Folder of the runs; finished ones in it are kept.")],
    method: Annotated[
        list[str] | None,
        typer.Option(help="METHOD or METHOD:SEEDS; may be given again; all and random without it."),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 10,
    recipe: Annotated[str, typer.Option(help="Backbone, size, optimizer and widths.")] = "small",
    modality: Modality = None,
    set_: Set = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """What frozen features of each method are worth, beside random weights and colour alone."""
    from noisyssl.benchmarks import representations
    from noisyssl.methods import METHODS

    wanted = representations.asked(method or (representations.RANDOM, *METHODS))

    def config_of(name: str, seed: int) -> "Config":
        flags = {"data.path": str(data), "data.modality": modality, "seed": seed, "pretrain.method": name}
        return resolve(recipe, set_, flags | {"pretrain.epochs": epochs, "pretrain.probe_every": 0})

    samples = open_data(config_of("simclr", 0), labelled=True)
    name = data.parent.name if data.suffix else data.name
    tell([representations.measure(name, samples, work, wanted, config_of, say)], out, as_json)


@app.command()
def inference(
    bundle: Annotated[
        Path | None, typer.Argument(help="Bundle; a ResNet-18 at 224 pixels without one.")
    ] = None,
    backbone: Annotated[str, typer.Option(help="Backbone where no bundle is given.")] = "resnet18",
    size: Annotated[int, typer.Option(help="Pixels where no bundle is given.")] = 224,
    threads: Threads = 0,
    runs: Runs = 15,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Latency and images a second: torch eager, channels-last, ONNX Runtime, TensorRT where it runs."""
    from noisyssl.benchmarks.inference import measure
    from noisyssl.pipelines.setup import threads_of

    tell(measure(bundle, backbone, size, threads_of(threads), runs), out, as_json)


@app.command()
def scan(threads: Threads = 0, out: Out = None, as_json: Json = False) -> None:
    """Images a second of `data check`, and whether it finds twelve kinds of broken files."""
    from noisyssl.benchmarks.scanning import measure
    from noisyssl.pipelines.setup import threads_of

    tell([measure(threads=threads_of(threads))], out, as_json)


@app.command()
def scaling(
    processes: Annotated[int, typer.Option(help="Processes; 0 is one per GPU, 2 without several.")] = 0,
    method: Annotated[str, typer.Option(help="Self-supervised method.")] = "simclr",
    recipe: Annotated[str, typer.Option(help="Backbone, size, optimizer, widths.")] = "small",
    batch: Annotated[int, typer.Option(help="Images per process.")] = 32,
    steps: Annotated[int, typer.Option(help="Steps in one turn.")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads of each process.")] = 1,
    runs: Runs = 5,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Images a second of a pretraining step by one process and by several, each with the same batch."""
    from noisyssl.benchmarks.scaling import Work, measure

    work = Work(method=method, recipe=recipe, batch=batch, steps=steps, threads=threads)
    tell([measure(work, processes, runs)], out, as_json)


@app.command()
def kill(
    kills: Annotated[int, typer.Option(help="Runs to kill.")] = 10,
    inside: Annotated[int, typer.Option(help="Of these inside a checkpoint write.")] = 4,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Kill training runs at random moments; do they resume to the same bits?"""
    from noisyssl.benchmarks.kill import measure

    with tempfile.TemporaryDirectory() as folder:
        tell([measure(Path(folder), kills, inside)], out, as_json)


@app.command()
def job(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished `noisyssl build` or `noisyssl demo`.")],
    name: Annotated[str, typer.Option(help="Question the record answers, such as demo.")] = "job",
    out: Out = None,
    as_json: Json = False,
) -> None:
    """What a main job gave: BEST and LAST, baselines, seconds."""
    from noisyssl.benchmarks.job import measure

    tell([measure(folder, name)], out, as_json)


@app.command()
def gpu(
    only: Annotated[str, typer.Option(help="Parts whose names hold this, such as 'ladder'.")] = "",
    threads: Threads = 0,
    runs: Runs = 5,
    count: Annotated[int, typer.Option(help="Painted images that are loaded.")] = 2048,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """All that needs an NVIDIA GPU, in minutes: feeding, training steps, DALI on the GPU, inference."""
    from noisyssl.benchmarks.gpu_suite import measure
    from noisyssl.pipelines.setup import threads_of

    tell(measure(say, threads_of(threads), runs, count, only), out, as_json)


@app.command()
def audit(
    data: Annotated[Path, typer.Argument(help="Labelled data whose labels are taken as the truth.")],
    features: Annotated[Path, typer.Option(help="Run whose backbone looks.")],
    noise: Annotated[list[str] | None, typer.Option(help="Noise to find; may be given again.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of the noise.")] = 3,
    threads: Threads = 0,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Does `noisyssl audit` find labels that were flipped on purpose?"""
    from noisyssl.benchmarks.auditing import measure
    from noisyssl.pipelines.embed import frozen_backbone

    config = resolve(None, None, {"data.path": str(data), "threads": threads or None})
    frozen, samples = frozen_backbone(features), open_data(config, labelled=True)
    name = data.parent.name if data.suffix else data.name
    specs = noise or ["symmetric:0.2", "instance:0.2"]
    tell([measure(name, samples, frozen, config, specs, seeds)], out, as_json)


@app.command()
def feeding(
    backbone: Annotated[str, typer.Option(help="Backbone that trains.")] = "resnet18-w32",
    size: Annotated[int, typer.Option(help="Pixels.")] = 64,
    batch: Annotated[int, typer.Option(help="Images per step.")] = 64,
    threads: Threads = 0,
    runs: Runs = 5,
    count: Annotated[int, typer.Option(help="Painted images that are loaded.")] = 1024,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """A training step on real batches against the same step on synthetic ones: what loading costs."""
    import torch

    from noisyssl.benchmarks.feeding import images, measure
    from noisyssl.pipelines.setup import threads_of

    cores = threads_of(threads)
    torch.set_num_threads(cores)
    with tempfile.TemporaryDirectory() as folder:
        files, packed = images(Path(folder), count, size, cores)
        ask = partial(measure, batch=batch, size=size, runs=runs, threads=cores)
        tell((ask(backbone, views, files, packed) for views in (1, 2)), out, as_json)


@app.command()
def growth(
    largest: Annotated[int, typer.Option(min=1000, help="Images of the largest set.")] = 1_000_000,
    parts: Annotated[str, typer.Option(help="Of epoch, opening and memory.")] = "epoch,opening,memory",
    threads: Threads = 0,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Time an image and memory, from a thousand images to a million."""
    from noisyssl.benchmarks.growth import measure
    from noisyssl.pipelines.setup import threads_of

    tell(measure(largest, threads_of(threads), parts=parts), out, as_json)


for command in (noise, engines, serving, dicom):
    app.command()(command)


@app.command("all")
def everything(
    out: Annotated[
        Path | None,
        typer.Option(
            help="JSON-lines file to append to; without it, one per question in benchmarks/results/."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Loading, feeding, step, inference, engines, serving, dicom, scan, scaling, growth and kill in turn."""
    from noisyssl.benchmarks.records import RESULTS

    commands: dict[str, Any] = {
        "loading": loading,
        "feeding": feeding,
        "step": step,
        "inference": inference,
        "engines": engines,
        "serving": serving,
        "dicom": partial(dicom, None),
        "scan": scan,
        "scaling": scaling,
        "growth": growth,
        "kill": kill,
    }
    for question, ask in commands.items():
        ask(out=out or RESULTS / f"{question}.jsonl", as_json=as_json)
