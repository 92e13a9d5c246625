"""`noisyssl build`: the main job in one command; `noisyssl demo`: the same on images it paints itself."""

import json
import time
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from noisyssl.cli.options import (
    AllowLeaks,
    Batch,
    Device,
    Json,
    Modality,
    Noise,
    Quarantine,
    Recipe,
    Seed,
    Set,
    Size,
    batch_of,
    open_data,
    resolve,
    settings,
)
from noisyssl.cli.progress import tell
from noisyssl.errors import ConfigError

if TYPE_CHECKING:
    from noisyssl.config import Config


def build(
    data: Annotated[
        Path | None,
        typer.Argument(help="Class folders, CSV, npz or packed folder, with labels; --resume knows it."),
    ] = None,
    out: Annotated[Path | None, typer.Argument(help="Folder to create; with --resume it is enough.")] = None,
    noise: Noise = None,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Also train from random weights, to show what pretraining gives."),
    ] = False,
    recipe: Recipe = None,
    set_: Set = None,
    seed: Seed = None,
    device: Device = None,
    batch: Batch = None,
    size: Size = None,
    modality: Modality = None,
    quarantine: Quarantine = None,
    allow_leaks: AllowLeaks = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a killed build stopped.")] = False,
    as_json: Json = False,
) -> None:
    """Pretrain, fine-tune on the given labels, export with proof, write the report: the main job.

    `build OUT --resume` goes on with the settings of the first start.
    """
    if resume and out is None:
        data, out = None, data
    if out is None or (data is None and not resume):
        raise ConfigError(
            "build needs DATA and OUT; `noisyssl build OUT --resume` goes on with a killed one."
        )
    config = settings_of(
        out,
        recipe,
        set_,
        {
            "data.path": None if data is None else str(data.absolute()),
            "data.size": size,
            "data.modality": modality,
            "data.quarantine": quarantine,
            "data.allow_leaks": allow_leaks,
            "train.noise": noise,
            "pretrain.batch": batch_of(batch),
            "train.batch": batch_of(batch),
            "seed": seed,
            "device": device,
        },
        resume,
    )
    result = main_job(config, out, compare=compare, resume=resume)
    typer.echo(json.dumps(result)) if as_json else _tell(result)
    _must_have_all(out)


def demo(
    out: Annotated[Path, typer.Argument(help="Folder to create.")] = Path("demo"),
    recipe: Annotated[str, typer.Option(help="Settings of the demonstration.")] = "demo",
    count: Annotated[int, typer.Option(help="Images to paint.")] = 2000,
    set_: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a killed one stopped.")] = False,
    as_json: Json = False,
) -> None:
    """Paint tissue-like images, flip 40 % of their labels, and run the main job on them."""
    from noisyssl.pipelines.generate import generate

    began = time.monotonic()
    if out.exists() and not resume:
        raise ConfigError(f"{out} already exists; give another folder, or --resume to go on with it.")
    is_fresh = not (out / "pretrain").exists()
    own = recipe if is_fresh or recipe != "demo" else None  # what is resumed may have had another
    flags = {"data.path": str((out / "images" / "manifest.csv").absolute())}
    config = settings_of(out, own, set_, flags, resume)
    if not (out / "images").exists():
        tell(f"painting {count} images of {config.data.size} pixels ...")
        generate(out / "images", count=count, size=config.data.size, seed=config.seed)
    result = main_job(config, out, compare=True, resume=True)
    finish(result, out, began if is_fresh else None)
    typer.echo(json.dumps(result)) if as_json else _tell(result)


def settings_of(
    out: Path, recipe: str | None, set_: list[str] | None, flags: dict[str, Any], resume: bool
) -> "Config":
    """The configuration; of a build that is resumed its own, which anything given must agree with.

    Raises:
        ConfigError: there is nothing to resume and no data to start with.
    """
    if resume and (out / "pretrain").exists():
        return settings(out / "pretrain", "pretrain", recipe, set_, flags, resume=True)
    if flags["data.path"] is None:
        raise ConfigError(
            f"{out} holds no build that began to pretrain; start it with DATA and its options: "
            f"noisyssl build DATA {quote(str(out))} --resume."
        )
    return resolve(recipe, set_, flags)


def main_job(config: "Config", out: Path, *, compare: bool, resume: bool) -> dict[str, Any]:
    """Everything from images to report below `out`; finished parts are kept when resuming."""
    from noisyssl.benchmarks.records import commit
    from noisyssl.benchmarks.report import write_report
    from noisyssl.cli.export import must_be_buildable, write_bundle
    from noisyssl.cli.training import run_stage
    from noisyssl.disk import write_whole
    from noisyssl.pipelines import pretrain, train
    from noisyssl.pipelines.reopen import in_splits_of
    from noisyssl.pipelines.run import Run

    began = time.monotonic()
    if out.exists() and not resume:
        raise ConfigError(f"{out} already exists; give a new folder, or --resume to go on with it.")
    for stage in (pretrain, train):  # what later parts would refuse is said now, and before the scan
        stage.must_make_sense(config)
    must_be_buildable(config.export)
    start, tuned, random = out / "pretrain", out / "train", out / "train-random"
    samples = open_data(config, moved=f"say where it is now: noisyssl build DATA {quote(str(out))} --resume")
    if start.exists():
        samples = in_splits_of(Run.open(start, "pretrain"), samples)
    for stage in (pretrain, train):
        stage.must_be_possible(config, samples)
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "build.json"  # what no stage's own settings say
    compare = compare or (kept.exists() and json.loads(kept.read_text())["compare"])
    write_whole(kept, json.dumps({"compare": compare}) + "\n")
    is_fresh = not start.exists()
    run_stage("pretrain", config, start, resume=start.exists(), samples=samples)
    with_init = replace(config, train=replace(config.train, init=str(start.absolute())))
    result: dict[str, Any] = {
        "pretrained": run_stage("train", with_init, tuned, resume=tuned.exists(), samples=samples)
    }
    if compare:
        result["random"] = run_stage("train", config, random, resume=random.exists(), samples=samples)
    if not (out / "bundle").exists():
        write_bundle(tuned, out / "bundle")
    write_report(tuned, out / "report.html")
    result |= {"bundle": str(out / "bundle"), "report": str(out / "report.html")}
    result["commit"] = commit()  # of the code that did it; a record may be written down later
    result["settings"] = {
        "size": config.data.size,
        "backbone": config.backbone,
        "method": config.pretrain.method,
        "pretraining epochs": config.pretrain.epochs,
        "training epochs": config.train.epochs,
        "seed": config.seed,
    }
    return finish(result, out, began if is_fresh else None)


def finish(result: dict[str, Any], out: Path, began: float | None) -> dict[str, Any]:
    """The result with its seconds (None where an earlier build did a part), kept as `result.json`."""
    from noisyssl.disk import write_whole

    result["seconds"] = None if began is None else time.monotonic() - began
    write_whole(out / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def _must_have_all(out: Path) -> None:
    """Raises ExportError when the bundle lacks a precision that the settings ask for."""
    from noisyssl.cli.export import must_have_all
    from noisyssl.deploy import bundle

    must_have_all(bundle.read(out / "bundle"))


def _tell(result: dict[str, Any]) -> None:
    """The final table: what pretraining gave, BEST and LAST, beside what colour alone can tell."""
    from noisyssl.cli.figures import injected, interval

    tuned = result["pretrained"]
    typer.echo(f"\nTest balanced accuracy [95 % interval]; {injected(tuned['noise'])}.")
    typer.echo(f"{'start':<28} {'BEST':<22} LAST")
    rows = [("self-supervised", tuned)] + ([("random", result["random"])] if "random" in result else [])
    for name, metrics in rows:
        best, last = (interval(metrics[k]["figures"]["balanced_accuracy"]) for k in ("best", "last"))
        typer.echo(f"{name:<28} {best:<22} {last}")
    for name, figures in tuned["baselines"].items():
        typer.echo(f"{'baseline ' + name.replace('_', ' '):<28} {interval(figures['balanced_accuracy'])}")
    typer.echo(f"\nbundle  {result['bundle']}\nreport  {result['report']}")
    if result["seconds"] is not None:
        typer.echo(f"{result['seconds']:.0f} s")
