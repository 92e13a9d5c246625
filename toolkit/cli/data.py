"""`noisyssl data`: look at images, labels and views before anything trains; pack, or paint, a set."""

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from noisyssl.cli.audit import apply
from noisyssl.cli.options import AllowLeaks, Json, Quarantine, open_data, resolve
from noisyssl.cli.progress import counting, tell
from noisyssl.errors import ConfigError

if TYPE_CHECKING:
    from noisyssl.pipelines.findings import Identical, Report

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Check, show, pack or generate images.")

SHOWN = 15
"""Findings of one kind that are printed; the tables and --json have all."""

Source = Annotated[
    Path, typer.Argument(help="Class folders, a flat folder, a CSV, an .npz or a packed folder.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads that decode; all cores by default.")]
SplitSeed = Annotated[int, typer.Option("--seed", help="Seed of the splits that the data does not give.")]


@app.command()
def check(
    data: Source,
    out: Annotated[Path | None, typer.Option(help="Write samples.csv and quarantine.csv here too.")] = None,
    unlabelled: Annotated[bool, typer.Option("--unlabelled", help="Ignore labels.")] = False,
    allow_leaks: AllowLeaks = None,
    quarantine: Quarantine = None,
    seed: SplitSeed = 0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Decode every image, and find broken files, identical images, groups that cross splits."""
    from noisyssl.pipelines.scan import check

    with counting("checking images") as progress:
        report = check(
            data,
            out=out,
            seed=seed,
            labelled=False if unlabelled else None,
            threads=threads,
            progress=progress,
        )
    if as_json:
        typer.echo(json.dumps(report.to_json()))
    else:
        show(report)
    report.raise_for(quarantine=bool(quarantine), allow_leaks=bool(allow_leaks))


def show(report: "Report") -> None:
    """Print a report for a person."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False, soft_wrap=True)
    splits = list(report.counts)
    table = Table("class", *splits, "all", show_footer=False)
    for column in table.columns[1:]:
        column.justify = "right"
    names = list(dict.fromkeys(name for counts in report.counts.values() for name in counts))
    for name in [*names, None]:
        row = [sum(c.values()) if name is None else c.get(name, 0) for c in report.counts.values()]
        if name is None and len(names) < 2:
            continue
        title = "all" if name is None else printable(name) or "(no labels)"
        table.add_row(title, *(f"{number:,}" for number in [*row, sum(row)]))
    console.print(table)
    for note in report.notes:
        console.print(note)
    lines = [f"{len(report.bad):,} bad files" + ("" if report.bad else ".")]
    lines += bad_lines(report.bad)
    lines += identical_lines("byte-identical files", report.same_bytes)
    lines += identical_lines("pixel-identical images", report.same_pixels)
    lines += [
        f"{len(report.crossing_groups):,} groups in more than one split"
        + ("" if report.crossing_groups else ".")
    ]
    lines += [f"  {printable(group)}: {', '.join(found)}" for group, found in report.crossing_groups[:SHOWN]]
    lines += [f"Cannot be trained on: {fault}" for fault in report.faults]
    lines += [f"samples.csv and quarantine.csv are in {report.folder}."] if report.folder else []
    console.print("\n".join(lines))


def bad_lines(bad: Sequence[tuple[str, str]]) -> list[str]:
    """How many files have each kind of reason, and the first of them."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for path, reason in bad:
        kinds.setdefault(re.sub(r"\(.*|[\d,]+", "", reason), []).append((path, reason))
    ordered = sorted(kinds.values(), key=len, reverse=True)
    lines = [f"  {len(same):,} such as {printable(same[0][0])}: {same[0][1]}" for same in ordered[:SHOWN]]
    return lines + ([f"  and {len(ordered) - SHOWN:,} more kinds"] if len(ordered) > SHOWN else [])


def identical_lines(what: str, found: "Identical") -> list[str]:
    """How many sets, and the first ones."""
    if not found.sets:
        return [f"0 sets of {what}."]
    lines = [
        f"{len(found.sets):,} sets of {what}, {found.across:,} of them across splits, "
        f"{found.contradicting:,} with more than one label"
    ]
    return lines + [
        f"  {' = '.join(map(printable, paths[:4]))}{' = ...' * (len(paths) > 4)}"
        for paths in found.sets[:SHOWN]
    ]


def printable(text: str) -> str:
    """`text` on one line, whatever bytes a file name holds."""
    return text if text.isprintable() else repr(text)[1:-1]


@app.command()
def views(
    data: Source,
    modality: Annotated[
        str | None, typer.Option(help="What the images are: natural, histology, xray or fundus.")
    ] = None,
    method: Annotated[str, typer.Option(help="Self-supervised method whose views are shown.")] = "simclr",
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("views.png"),
    size: Annotated[int, typer.Option(min=16, help="Height and width of training in pixels.")] = 224,
    images: Annotated[int, typer.Option(min=1, max=100, help="Images shown, one a row.")] = 6,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice and of every draw.")] = 0,
    allow_leaks: AllowLeaks = None,
    quarantine: Quarantine = None,
) -> None:
    """A contact sheet: originals, and what pretraining and training will make of them."""
    must_be_new_png(out)
    config = resolve(
        None,
        None,
        {
            "data.path": str(data),
            "data.modality": modality,
            "data.size": size,
            "data.allow_leaks": allow_leaks,
            "data.quarantine": quarantine,
            "pretrain.method": method,
            "seed": seed,
        },
    )
    from noisyssl.disk import write_whole
    from noisyssl.pipelines.contact_sheet import contact_sheet
    from noisyssl.pipelines.modality import concerns, stage_views

    shown = stage_views(config, "pretrain")
    samples = open_data(config)
    for message in concerns(config, "pretrain", samples):
        say(message)
    groups = [
        (f"{method} view", shown, max(1, 6 // len(shown))),
        ("training view", stage_views(config, "train"), 2),
    ]
    title = (
        f"noisyssl data views {data.name} --modality {config.data.modality} --method {method} --seed {seed}"
    )
    sheet = contact_sheet(samples, groups, title=title, size=size, seed=seed, rows=images)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_whole(out, buffer.getvalue())
    typer.echo(f"{out} shows {min(images, len(samples.where('train')))} training images.")


def must_be_new_png(out: Path) -> None:
    """Raises ConfigError for what cannot be written, before the images are scanned."""
    if out.exists():
        raise ConfigError(f"--out {out} already exists; name another file.")
    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out is {out}; the sheet is a PNG file: give it a name ending in .png.")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out is {out}, but there is no folder {out.parent}; create it first.")


@app.command()
def pack(
    data: Source,
    out: Annotated[Path, typer.Argument(help="New folder.")],
    size: Annotated[
        int | None, typer.Option(help="Side in pixels; not needed if all images have one size.")
    ] = None,
    fit: Annotated[str, typer.Option(help="crop, squash or pad: how an image becomes a square.")] = "crop",
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="Ignore labels: enough to pretrain on.")
    ] = False,
    allow_leaks: AllowLeaks = None,
    quarantine: Quarantine = None,
    seed: SplitSeed = 0,
    threads: Threads = None,
) -> None:
    """Decode and resize every image once, into one file that is mapped into memory."""
    from noisyssl.pipelines.pack import pack
    from noisyssl.pipelines.scan import open_samples

    with counting("checking images") as progress:
        samples = open_samples(
            data,
            seed=seed,
            quarantine=bool(quarantine),
            allow_leaks=bool(allow_leaks),
            labelled=False if unlabelled else None,
            threads=threads,
            progress=progress,
        )
    for note in samples.notes:
        say(note)
    with counting("packing images") as progress:
        pack(samples, out, size=size, fit=fit, threads=threads, progress=progress, say=say)
    typer.echo(f"{len(samples):,} images packed in {out}.")


def say(sentence: str) -> None:
    """Tell the user on stderr."""
    tell(f"note: {sentence}")


@app.command()
def generate(
    out: Annotated[Path, typer.Argument(help="New folder.")],
    count: Annotated[int, typer.Option(help="Images in all.")] = 2000,
    size: Annotated[int, typer.Option(help="Height and width in pixels.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of every stroke.")] = 0,
    difficulty: Annotated[
        float, typer.Option(help="1: colour tells little of the class and tissues mix; 0: neither.")
    ] = 1.0,
) -> None:
    """Paint tissue-like images of nine classes, with slides as groups and true labels."""
    from noisyssl.pipelines.generate import generate

    with counting("painting images") as progress:
        generate(out, count=count, size=size, seed=seed, difficulty=difficulty, progress=progress)
    manifest = out / "manifest.csv"
    typer.echo(f"{count:,} images painted; {manifest} has their labels and splits.")
    typer.echo(f"Next: noisyssl build {quote(str(manifest))} OUT --recipe small")


app.command()(apply)
